"""Proves the contrastive losses on this machine: dense = tiled = ring = accumulated, value and gradients."""

import argparse
import os
import sys

from tools import command

EXPLAIN = """what is compared, each with float64 on the same embeddings:
  dense        the matrix of all pairs at once
  tiled        one device, a tile of images at a time
  ring         all devices; texts travel from one to the next, no device holds more than a tile
  accumulated  the batch's embeddings in micro-batches, the loss once, the gradients replayed

Columns are relative errors (norm of the difference / norm): of the loss, and of its gradients by the image and text
embeddings, by t (log of the temperature) and by b (bias). 'new' and 'learned' are the temperatures and biases of a
model at its start and after training. Float32 rounds at 6e-8; beyond 1e-5 something is wrong, and the exit code is 1.
What float32 has to round away anyhow is forgiven: where pairs are learned, or all alike so that gradients cancel, it is
more than what is left.

examples:
  On the devices of this machine:
    python -m tools.check_loss

  Without any, on eight simulated ones; the last tile is a shorter one:
    python -m tools.check_loss --devices=8 --batch=256 --tile=12

  On embeddings of your own, zimg and ztxt of one shape with rows of length 1:
    python -m tools.check_loss --embeddings=mine.npz

Where it says no, it says what to set for now. Report the table and the versions of jax and its plugins.
The same in Python: big_vlm.checks.loss_forms.compare(batch, width)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('check_loss', __doc__, EXPLAIN)
    result.add_argument('--devices', type=int, metavar='N', help='simulate N devices on the CPU (default: those here)')
    result.add_argument('--batch', type=int, default=384, metavar='B', help='pairs (default: 384)')
    result.add_argument('--width', type=int, default=64, metavar='E', help='of the embeddings (default: 64)')
    result.add_argument('--tile', type=int, default=0, metavar='R', help='images of a tile (default: a third of them)')
    result.add_argument('--accumulate', type=int, default=4, metavar='N', help='micro-batches (default: 4)')
    result.add_argument('--embeddings', metavar='FILE.npz', help='its zimg and ztxt in place of random ones')
    result.add_argument('--seed', type=int, default=0, help='of the random embeddings (default: 0)')
    return result


def run(argv: list[str]) -> int:
    """The tool. Returns the exit code, raises UserError."""
    args = parser().parse_args(argv)
    if args.devices is not None:
        simulate(args.devices)
    import jax

    from big_vlm.checks import loss_forms

    devices = f'{jax.device_count()} {jax.devices()[0].platform} device{"s" if jax.device_count() > 1 else ""}'
    embeddings, (batch, width) = None, (args.batch, args.width)
    if args.embeddings is not None:
        embeddings = loss_forms.read(args.embeddings)
        batch, width = embeddings['zimg'].shape
    print(f'{batch} pairs of width {width} on {devices}, jax {jax.__version__}; relative errors:', flush=True)
    names = ('value', 'zimg', 'ztxt', 't', 'b')
    print(f'{"loss":8} {"model":8} {"form":12}' + ''.join(f'{name:>10}' for name in names))
    wrong = []
    for row in loss_forms.compare(batch, width, args.tile, args.accumulate, args.seed, embeddings):
        shown = ''.join(f'{row.errors[name]:10.1e}' if name in row.errors else f'{"":10}' for name in names)
        print(f'{row.loss:8} {row.temperature:8} {row.form:12}{shown}', flush=True)
        # Not `>`: an error that is not a number is wrong too.
        wrong += [(row.loss, row.form, name) for name, e in row.errors.items() if not e <= loss_forms.LIMIT]
    if wrong:
        print(f'WRONG, beyond {loss_forms.LIMIT:.0e}: {", ".join(dict.fromkeys(map(" ".join, wrong)))}')
        for loss in dict.fromkeys(loss for loss, *_ in wrong):
            print(f'{loss}: {_instead({form for one, form, _ in wrong if one == loss})}')
        return 1
    print(f'all agree within {loss_forms.LIMIT:.0e}')
    return 0


def _instead(wrong: set[str]) -> str:
    """What to do where these forms of a loss are wrong."""
    right = [f"model.loss_form='{form}'" for form in ('dense', 'ring') if form not in wrong]
    if not right:
        return 'no form is right on these devices: train on others'
    return f'set {right[0]}{" and accumulate=1" if "accumulated" in wrong else ""} for now'


def simulate(devices: int) -> None:
    """So many CPU devices; to be called before jax starts."""
    from big_vlm.config import UserError

    if devices < 1:
        raise UserError(f'--devices={devices}: must be at least 1')
    os.environ['JAX_PLATFORMS'] = 'cpu'
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={devices}'.strip()


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if all agree, 1 if not, 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
