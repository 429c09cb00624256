"""The frame of a report: one HTML document with its style sheet inside, light or dark as the reader's system is."""

from html import escape

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1b2130; --muted: #6b7280; --line: #e6e3dc; --wash: #f2f0ea;
  --accent: #0f6f78; --soft: #b4d6d8; --good: #15803d; --good-wash: #e7f5ea; --bad: #c2360c; --bad-wash: #fdece4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1c2028; --ink: #e8eaee; --muted: #98a1b0; --line: #313743; --wash: #252a34;
    --accent: #4cc3c7; --soft: #285a60; --good: #5cc97c; --good-wash: #1b3324; --bad: #ff8f66; --bad-wash: #3d231a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 56px 32px 72px; }
.hero { display: grid; grid-template-columns: 1fr 236px; gap: 56px; align-items: center; margin-bottom: 34px; }
.talk { overflow: hidden; padding-bottom: 14px; }
.talk p { margin: 10px 14px 0; padding: 6px 12px; border-radius: 13px; font-size: 14px; width: fit-content; }
.talk p { line-height: 1.35; max-width: calc(100% - 44px); }
.talk .ask { background: var(--wash); border-bottom-left-radius: 3px; }
.talk .say { background: var(--accent); color: var(--card); font-weight: 600; }
.talk .say { margin-left: auto; border-bottom-right-radius: 3px; }
h1 { font-size: 40px; line-height: 1.12; letter-spacing: -0.025em; margin: 0 0 14px; text-wrap: balance; }
h2 { font-size: 22px; letter-spacing: -0.012em; margin: 60px 0 4px; }
h3 { font-size: 14.5px; margin: 0 0 12px; }
p.lead { font-size: 18px; max-width: 46em; margin: 0 0 18px; color: var(--muted); text-wrap: pretty; }
p.about { color: var(--muted); margin: 0 0 18px; max-width: 52em; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: 13px; letter-spacing: 0.02em; margin-bottom: 14px; }
code, pre, .loc { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 26px; margin: 0 0 22px; font-size: 14px; }
.hero .facts { margin: 0; }
.facts span { color: var(--muted); margin-right: 7px; }
.facts b { font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 0 0 14px; }
.tile { padding: 16px 20px 16px; }
.tile .what { font-size: 13px; color: var(--muted); overflow-wrap: anywhere; }
.tile .what b { display: block; color: var(--ink); font-weight: 600; }
.tile .big { font-size: 40px; font-weight: 650; letter-spacing: -0.035em; line-height: 1.15; margin: 2px 0 8px; }
.tile .big small { font-size: 22px; font-weight: 500; color: var(--muted); letter-spacing: 0; margin-left: 1px; }
.tile .chance { font-size: 12.5px; color: var(--muted); margin-top: 7px; }
.bar { position: relative; height: 7px; border-radius: 4px; background: var(--wash); min-width: 80px; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); opacity: 0.75; }
.bar.below i { background: var(--bad); }
.commands { padding: 6px 20px 18px; }
.commands div { font-size: 13px; color: var(--muted); margin: 12px 0 5px; }
pre {
  margin: 0; padding: 11px 14px; border-radius: 8px; background: var(--wash); font-size: 13px; line-height: 1.55;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.tables { columns: 2; column-gap: 16px; }
.tables .card { break-inside: avoid; padding: 16px 20px 12px; margin: 0 0 16px; }
@media (max-width: 860px) { .hero { grid-template-columns: 1fr; } .talk { max-width: 236px; } }
@media (max-width: 860px) { .tables { columns: 1; } h1 { font-size: 32px; } main { padding: 32px 18px 48px; } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.tables td, .tables th { padding: 5px 0 5px 12px; font-size: 13.5px; text-align: right; font-weight: 400; }
.tables th:first-child, .tables td:first-child { text-align: left; padding-left: 0; }
.tables thead th { color: var(--muted); font-size: 12px; border-bottom: 1px solid var(--line); }
.tables td.bars { width: 34%; }
.tables.wide { columns: 1; } .tables.wide td { overflow-wrap: anywhere; }
.tables tr.whole td { font-weight: 600; }
.tables tr.whole td.quiet, .tables td.quiet { color: var(--muted); font-weight: 400; }
.tables tr.slice td:first-child { padding-left: 14px; color: var(--muted); }
.tables tr.slice .bar i { opacity: 0.6; }
.key { display: flex; flex-wrap: wrap; gap: 6px 20px; align-items: center; font-size: 13px; color: var(--muted); }
.key svg { width: 22px; height: 12px; margin-right: 6px; vertical-align: -1px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(196px, 1fr)); gap: 14px; }
.shot { overflow: hidden; display: flex; flex-direction: column; }
.shot .text { padding: 11px 14px 13px; font-size: 13.5px; line-height: 1.4; overflow-wrap: anywhere; }
.shot .prompt { color: var(--muted); }
.shot .answer { font-weight: 600; font-size: 15px; margin: 5px 0 0; }
.shot .truth { color: var(--muted); font-size: 12.5px; margin-top: 5px; }
.shot.good { border-color: color-mix(in srgb, var(--good) 45%, var(--line)); }
.shot.bad { border-color: var(--bad); }
.shot.good .answer { color: var(--good); } .shot.bad .answer { color: var(--bad); }
.loc { font-size: 10.5px; font-weight: 400; color: var(--muted); }
.view { position: relative; line-height: 0; background: var(--wash); }
.view img { width: 100%; display: block; image-rendering: pixelated; }
.view img.photo { image-rendering: auto; }
.view svg, .view img.over { position: absolute; inset: 0; width: 100%; height: 100%; }
.shot .top { display: flex; gap: 8px; justify-content: space-between; align-items: start; }
.badge { flex: none; font-size: 12px; font-weight: 600; line-height: 20px; padding: 0 8px; border-radius: 99px; }
.badge { color: var(--muted); background: var(--wash); }
.good .badge { color: var(--good); background: var(--good-wash); }
.bad .badge { color: var(--bad); background: var(--bad-wash); }
#only:checked ~ .grid .shot:not(.bad) { display: none; }
#only { accent-color: var(--bad); margin: 0 6px 0 0; order: 1; }
#only + label { font-size: 13px; color: var(--muted); cursor: pointer; order: 1; }
.asked { display: flex; flex-wrap: wrap; align-items: center; }
.asked .key { flex: 1; } .asked .grid { width: 100%; order: 2; margin-top: 12px; }
.looks { padding: 18px 20px; margin: 0 0 14px; }
.looks .strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 12px; }
.looks .view { border-radius: 7px; overflow: hidden; }
.looks .token { font-size: 14px; font-weight: 600; margin-top: 7px; text-align: center; overflow-wrap: anywhere; }
.looks .mass { font-size: 11.5px; color: var(--muted); text-align: center; }
.cut { display: grid; grid-template-columns: 1fr 40px 1.1fr; gap: 22px; align-items: center; }
.cut { padding: 22px 26px; max-width: 780px; }
.cut .arrow { font-size: 28px; color: var(--muted); text-align: center; }
.cut > img { width: 100%; image-rendering: pixelated; display: block; }
.cut .view { border-radius: 6px; overflow: hidden; }
.near { padding: 20px; overflow-x: auto; width: fit-content; max-width: 100%; }
.near table { width: auto; }
.near td, .near th { padding: 2px; text-align: center; font-weight: 400; }
.near th:first-child { text-align: right; padding-right: 12px; font-size: 13px; max-width: 330px; line-height: 1.25; }
.near img { width: 54px; height: 54px; object-fit: cover; border-radius: 6px; display: block; margin: auto; }
.near img { image-rendering: pixelated; }
.near span { display: block; width: 54px; line-height: 34px; border-radius: 6px; font-size: 12px; }
.near .own { outline: 2px solid var(--good); outline-offset: -2px; }
.near .first { font-weight: 700; }
.near .wrong { outline: 2px dashed var(--bad); outline-offset: -2px; }
.stage { padding: 18px 20px 12px; margin: 0 0 14px; }
.stage .facts { margin: -6px 0 12px; font-size: 13px; }
.stage details .facts { margin: 12px 0 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 10px 26px; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); margin-top: 12px; }
.plots svg { width: 100%; height: auto; display: block; }
details summary { cursor: pointer; color: var(--muted); font-size: 13.5px; padding: 4px 0; }
details.card { padding: 12px 20px; margin-top: 14px; } details.card[open] pre { margin: 10px 0 8px; }
.tok { --of: var(--muted); display: inline-block; white-space: pre; padding: 0 4px; margin: 2px 1px; }
.tok { background: color-mix(in srgb, var(--of) 24%, transparent); border-bottom: 3px solid transparent; }
.tok { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; color: var(--ink); }
.image { --of: #7c6bd6; } .prefix, .text { --of: #2f7fd0; } .suffix { --of: #e08a1e; } .padding { --of: #9aa0aa; }
.tok.loss { border-bottom-color: var(--of); }
.inspected { display: grid; grid-template-columns: 176px 1fr auto; gap: 22px; padding: 18px 20px; margin: 14px 0; }
.inspected img { width: 100%; display: block; margin: 0 0 8px; image-rendering: pixelated; border-radius: 5px; }
.inspected img.photo { image-rendering: auto; } .inspected p { margin: 10px 0 0; font-size: 13px; }
.sees { align-self: start; } .sees text { font-size: 9px; fill: var(--muted); }
.sees rect { fill: var(--of); stroke: var(--card); stroke-width: 0.6; } .sees .unseen { fill: var(--wash); }
.worst { padding: 6px 20px; font-size: 13.5px; } .worst del { color: var(--bad); }
.problem { padding: 12px 20px; border-color: var(--bad); color: var(--bad); background: var(--bad-wash); }
@media (max-width: 860px) { .inspected { grid-template-columns: 1fr; } }
footer { margin-top: 56px; color: var(--muted); font-size: 12.5px; }
"""


def document(title: str, body: str) -> str:
    """A whole page: `title` is text and gets escaped, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n'
        '<footer>Written by big_vlm. This page needs no network and runs no scripts.</footer>\n'
        '</main>\n</body>\n</html>\n'
    )
