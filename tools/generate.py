"""Answers from a trained bundle, or from any checkpoint of a decoder: images and prompts in, text out."""

import argparse
import json
import os
import sys

from tools import command

EXAMPLES = """examples:
  One question about one picture:
    python -m tools.generate runs/quickstart/multimodal/bundle --image=scene.png --prompt='caption en'

  Several questions about it, or one question about several pictures:
    python -m tools.generate BUNDLE --image=scene.png --prompt='caption en' --prompt='how many digits are there?'
    python -m tools.generate BUNDLE --image=a.png --image=b.png --prompt='caption en'

  A question for each picture (the same number of both, paired in order):
    python -m tools.generate BUNDLE --image=a.png --prompt='caption en' --image=b.png --prompt='which digit is red?'

  Several pictures for one example, of a model that was trained on several (contract.images); or frames of a video:
    python -m tools.generate BUNDLE --image=left.png --image=right.png --together --prompt='are both red?'
    python -m tools.generate BUNDLE --image=clip.mp4 --prompt='caption en'

  A decoder alone goes on with a text. It may be a folder of Hugging Face or a .gguf, as any model here;
  an .npz comes without its tokenizer:
    python -m tools.generate gemma-3-270m-Q4_K_M.gguf --prompt='The capital of France is' --max_new_tokens=16
    python -m tools.generate paligemma-3b-mix-224.npz --tokenizer=gemma.model --image=scene.png --prompt='caption en'

  One answer, printed as it is said; and a model of 3 billion weights in 6 GB of memory, 10 while they are laid out:
    python -m tools.generate BUNDLE --image=scene.png --prompt='caption en' --stream
    python -m tools.generate paligemma-3b-mix-224 --image=scene.png --prompt='caption en' --dtype=bfloat16

  One line of JSON per answer, written as soon as it is there:
    python -m tools.generate BUNDLE --image=scene.png --prompt='caption en' --json
    {"image": "scene.png", "prompt": "caption en", "text": "a red three", "ids": [..., 1], "log_probs": [-0.02, ...]}

  Boxes: draw what a 'detect' prompt found (for several answers name a folder):
    python -m tools.generate BUNDLE --image=scene.png --prompt='detect red three' --draw=found.png

  A sampled answer; another seed gives another one, the same seed the same one again:
    python -m tools.generate BUNDLE --image=scene.png --prompt='caption en' --temperature=1 --seed=3

  Draws from likely tokens alone, the best of four; or no draw, and the likeliest answer that eight beams find:
    python -m tools.generate BUNDLE --image=scene.png --prompt='caption en' --temperature=1 --top_p=0.9 --best_of=4
    python -m tools.generate BUNDLE --image=scene.png --prompt='caption en' --beams=8

  Answers out of a set, and boxes with nothing else, each once (with --choices, of these labels):
    python -m tools.generate BUNDLE --image=scene.png --prompt='is the three red?' --choices=yes,no
    python -m tools.generate BUNDLE --image=scene.png --prompt='detect digit' --grammar=boxes

  Many requests, a line {"image": "a.png", "prompt": "caption en"} each, with pictures from a folder. Started again, it
  goes on where it was stopped. What is wrong with a line is said in its answer, and the exit code is then 1:
    python -m tools.generate BUNDLE --requests=asked.jsonl --images=photos --out=answers.jsonl

Of several --prompt, one that cannot be answered is named on stderr, the others are answered, and the exit code is 2.
The log-probabilities are the model's own, in nats, one per token (the end-of-text token is the last id).
The same in Python: big_vlm.load(BUNDLE).generate(images, prompts)
"""

# Options that are keywords of `Bundle.generate`, under the same names.
SETTINGS = (
    *('max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'stop', 'beams', 'best_of'),
    *('prompt_lookup', 'length_penalty', 'grammar', 'seed', 'batch_size'),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('generate', __doc__, EXAMPLES)
    result.add_argument('bundle', metavar='BUNDLE', help='folder of a trained model; or what tools.convert reads')
    result.add_argument('--image', action='append', default=[], metavar='FILE', help='a picture; repeat for several')
    result.add_argument('--together', action='store_true', help='all --image are of one example, not one each')
    result.add_argument('--prompt', action='append', default=[], metavar='TEXT', help='a prompt; repeat for several')
    result.add_argument('--max_new_tokens', type=int, default=64, metavar='N', help='longest answer (default: 64)')
    number = dict(metavar='X', type=float)
    result.add_argument(
        '--temperature', type=float, default=0.0, metavar='T', help='0 takes the most likely token (default), 1 samples'
    )
    result.add_argument('--top_k', type=int, default=0, metavar='K', help='sample from the K likeliest tokens (0: all)')
    result.add_argument(
        '--top_p', default=1.0, help='… from the likeliest whose probabilities reach X (1: all)', **number
    )
    result.add_argument('--min_p', default=0.0, help="… from those with X of the likeliest one's (0: all)", **number)
    result.add_argument(
        '--repetition_penalty',
        default=1.0,
        help='above 1, tokens of prompt and answer weigh less (1: no less)',
        **number,
    )
    result.add_argument(
        '--stop', action='append', default=[], metavar='TEXT', help='ends an answer; repeat for several'
    )
    result.add_argument('--beams', type=int, default=1, metavar='N', help='beam search over N beginnings (default: 1)')
    result.add_argument('--best_of', type=int, default=1, metavar='N', help='the best of N samples (default: 1)')
    result.add_argument(
        '--prompt_lookup',
        type=int,
        default=0,
        metavar='N',
        help='guess N tokens at once from prompt and answer; the same answers, sooner where they repeat words (0: off)',
    )
    result.add_argument(
        '--length_penalty',
        default=1.0,
        help='beams and samples score log-probability / tokens^X (default: 1)',
        **number,
    )
    result.add_argument('--seed', type=int, default=0, help='of the sampling (default: 0)')
    result.add_argument(
        '--slots',
        '--batch_size',
        dest='batch_size',
        type=int,
        default=16,
        metavar='N',
        help='answers made at once, a power of two; a slot that comes free takes the next (default: 16)',
    )
    result.add_argument('--choices', metavar='A,B,C', help='the answers that may be given; with --grammar: the labels')
    result.add_argument('--grammar', default='', metavar='boxes', help="'boxes': objects in location tokens, each once")
    result.add_argument(
        '--requests', metavar='FILE.jsonl', help='a line for each request, instead of --image, --prompt'
    )
    result.add_argument('--images', metavar='FOLDER', help="where their pictures are (default: the file's folder)")
    result.add_argument('--out', metavar='OUT.jsonl', help='where their answers go; it is continued if it is there')
    result.add_argument(
        '--quantize',
        default='',
        metavar='int8|int4',
        help='weights of 8 or 4 bits: less memory, other answers at times',
    )
    result.add_argument('--tokenizer', default='', metavar='FILE', help='SentencePiece model, if BUNDLE comes without')
    result.add_argument(
        '--dtype', default='', metavar='bfloat16|float32', help="of weights and products (default: the bundle's)"
    )
    result.add_argument('--stream', action='store_true', help='print the text of one answer as it is said')
    result.add_argument('--json', action='store_true', help='one JSON object per answer: text, ids, log_probs')
    result.add_argument('--draw', metavar='OUT.png', help='write the picture with the boxes of the answer drawn in')
    return result


def pairs(images: list, prompts: list[str]) -> list[tuple]:
    """(image, prompt) of every answer: one of either is used for all of the other, else they pair up in order.

    No image is None, a decoder's alone.
    """
    from big_vlm.config import UserError

    if not prompts:
        raise UserError("--prompt='...' is missing: give at least one prompt (--help shows examples)")
    images = images or [None]
    if len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        raise UserError(
            f'{len(images)} images and {len(prompts)} prompts: give one of either, or the same number of both'
        )
    count = max(len(images), len(prompts))
    images = images if len(images) == count else images * count
    prompts = prompts if len(prompts) == count else prompts * count
    return list(zip(images, prompts, strict=True))


def load(path: str, quantize: str = '', dtype: str = '', tokenizer: str = ''):
    """A bundle, or any checkpoint that `tools.convert` reads, in other numbers if asked. Raises UserError."""
    import big_vlm
    from big_vlm import bundle

    foreign = '.npz' in path or path.endswith('.gguf') or os.path.isfile(os.path.join(path, 'config.json'))
    if not foreign and not tokenizer:
        return big_vlm.load(path, quantize=quantize, dtype=dtype)
    loaded = bundle.load_any(path, tokenizer=tokenizer, dtype=dtype)
    return loaded.quantised(quantize) if quantize else loaded


def draw_boxes(image_path: str, answer: str, out: str) -> int:
    """Writes the picture with the answer's boxes and labels drawn in; returns how many boxes there were."""
    from PIL import Image, ImageDraw

    from big_vlm.config import UserError
    from big_vlm.data import images
    from big_vlm.data.coordinates import text_to_boxes

    picture = Image.fromarray(images.read(image_path, f'--draw={out}'))
    width, height = picture.size
    found = text_to_boxes(answer)
    pen = ImageDraw.Draw(picture)
    line = max(1, min(width, height) // 100)
    for i, ((y1, x1, y2, x2), label) in enumerate(found):
        color = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#008080')[i % 6]
        # A model may name the corners in any order.
        left, right = sorted(min(round(x * width), width - 1) for x in (x1, x2))
        top, bottom = sorted(min(round(y * height), height - 1) for y in (y1, y2))
        pen.rectangle((left, top, right, bottom), outline=color, width=line)
        pen.text((left + line + 1, top + line), label, fill=color)
    try:
        picture.save(out)
    except OSError as error:
        raise UserError(f'--draw={out}: cannot write the picture: {error}') from None
    return len(found)


def prepare_drawing(out: str, several: bool) -> None:
    """Refuses, before anything is loaded, a place to which no picture can be written; makes the folder of several."""
    from PIL import Image

    from big_vlm.config import UserError

    folder = out if several else os.path.dirname(out) or '.'
    if several and os.path.splitext(out)[1]:
        raise UserError(f'--draw={out}: several answers need a folder, such as --draw={os.path.splitext(out)[0]}')
    if not several and Image.registered_extensions().get(os.path.splitext(out)[1].lower()) not in Image.SAVE:
        raise UserError(f'--draw={out}: must end in the name of an image format, such as .png')
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'--draw={out}: cannot make the folder {folder}: {error.strerror}') from None


def settings(args: argparse.Namespace) -> dict:
    """Of every answer: `Bundle.generate`'s."""
    choices = None if args.choices is None else [choice.strip() for choice in args.choices.split(',')]
    return {name: getattr(args, name) for name in SETTINGS} | {'choices': choices}


def answer_file(args: argparse.Namespace) -> int:
    """`--requests`: the exit code, 1 if there are requests without an answer, 130 after Ctrl-C. Raises UserError."""
    from pathlib import Path

    from big_vlm.config import UserError

    for name in ('image', 'together', 'prompt', 'stream', 'json', 'draw'):
        if getattr(args, name):
            raise UserError(f'--{name} does not go with --requests: leave it out')
    if not args.out:
        raise UserError('--out=OUT.jsonl is missing: where the answers to --requests go')
    folder = Path(args.images) if args.images else Path(args.requests).parent
    if not folder.is_dir():
        raise UserError(f'--images={folder}: no such folder')

    from big_vlm.bundle import requests
    from big_vlm.reports import writers

    out, asked = Path(args.out), requests.read(Path(args.requests), folder)
    bundle = load(args.bundle, args.quantize, args.dtype, args.tokenizer)
    name = ' as '.join(filter(None, (os.path.realpath(args.bundle), args.quantize, args.dtype)))
    name += f' with {os.path.realpath(args.tokenizer)}' if args.tokenizer else ''
    progress = writers.ProgressWriter(len(asked), 'answers', show=())
    every = 1 if sys.stderr.isatty() else args.batch_size
    start, done = None, 0
    try:
        for done in requests.answer(bundle, asked, out, settings(args), name=name, folder=folder):
            start = done if start is None else start
            if (done - start) % every == 0 or done == len(asked):
                progress.write(done, {})
    except KeyboardInterrupt:
        print(f'\n{out}: stopped at {done} of {len(asked)}; the same command goes on from there', file=sys.stderr)
        return 130
    progress.close()
    failed = requests.failures(out)
    print(f'{out}: {len(asked) - failed} answers' + f', {failed} errors' * bool(failed), file=sys.stderr)
    return 1 if failed else 0


def run(argv: list[str]) -> int:
    """The tool: its exit code. Raises UserError."""
    args = parser().parse_args(argv)
    from big_vlm.config import UserError

    if args.batch_size < 1:
        raise UserError(f'--slots={args.batch_size}: must be at least 1')
    if args.requests:
        return answer_file(args)
    if args.images or args.out:
        raise UserError('--images and --out go with --requests=FILE.jsonl')
    images = [args.image] if args.together else args.image
    asked = pairs(images, args.prompt)
    if args.stream and (len(asked) > 1 or args.json or args.draw):
        raise UserError('--stream prints one answer as text: give one --prompt, one --image, and no --json or --draw')
    if args.draw and (args.together or not args.image):
        raise UserError(f'--draw={args.draw}: boxes are drawn into one picture: give one --image for each answer')
    if args.draw:
        prepare_drawing(args.draw, several=len(asked) > 1)
    for path in dict.fromkeys(args.image):  # before the minutes that loading a large model takes
        if not os.path.isfile(path):
            raise UserError(f'--image={path}: no such file')

    model = load(args.bundle, args.quantize, args.dtype, args.tokenizer)
    if args.stream:
        [(image, prompt)] = asked
        for piece in model.stream(image, prompt, **settings(args)):
            print(piece, end='', flush=True)
        print(flush=True)
        return 0
    answers = model.generate_each(
        [image for image, _ in asked] if len(images) > 1 else images or None,
        [prompt for _, prompt in asked],
        errors='return' if len(asked) > 1 else 'raise',
        **settings(args),
    )
    failed = 0
    for i, ((image, prompt), answer) in enumerate(zip(asked, answers, strict=True)):
        if answer.error:
            failed += 1
            print(f'not answered: {answer.error}', file=sys.stderr, flush=True)
            continue
        if args.json:
            line = {'image': image, 'prompt': prompt, 'text': answer.text}
            line |= {'ids': answer.ids, 'log_probs': [round(x, 6) + 0.0 for x in answer.log_probs]}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            shown = '  '.join([*(image if args.together else [image] if image else []), prompt])
            print(answer.text if len(asked) == 1 else f'{shown}\n  {answer.text}', flush=True)
        if args.draw:
            out = args.draw if len(asked) == 1 else os.path.join(args.draw, f'{i:04d}.png')
            count = draw_boxes(image, answer.text, out)
            print(f'{out}: {count} box{"" if count == 1 else "es"}', file=sys.stderr)
        if len(asked) > args.batch_size and ((i + 1) % args.batch_size == 0 or i + 1 == len(asked)):
            print(f'{i + 1} of {len(asked)} answers', file=sys.stderr, flush=True)
    if failed:
        raise UserError(f'{failed} of {len(asked)} requests could not be answered, each named above')
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 if some of --requests could not be answered; 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
