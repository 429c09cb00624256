"""A model in another format: bundle, big_vision's .npz, Hugging Face folder; any into any, weights bit for bit.

GGUF files of llama.cpp are read as well, their weights dequantised to float32, and written: of Gemmas, and of the
decoders of PaliGemmas.
"""

import argparse
import ctypes
import logging
import sys

from tools import command

_MMAP_THRESHOLD = -3  # mallopt's number
EXAMPLES = """examples:
  A published checkpoint as a bundle, to load, to evaluate and to train from; nothing is fetched here:
    hf download google/siglip-base-patch16-224 --local-dir siglip-base-patch16-224
    python -m tools.convert siglip-base-patch16-224 siglip_b16
    python -m tools.convert siglip_b16_224.npz siglip_b16 --tokenizer=c4_en.model
    python -m tools.convert paligemma-3b-pt-224.npz paligemma_224 --tokenizer=gemma_tokenizer.model

  A trained bundle for transformers, and for big_vision:
    python -m tools.convert runs/mine/pretrain/bundle my_siglip
    python -m tools.convert runs/mine/pretrain/bundle my_siglip.npz

  At another resolution, position embeddings resized:
    python -m tools.convert siglip_b16_224.npz siglip_b16_384 --image_size=384 --tokenizer=c4_en.model

  A quantised Gemma of llama.cpp for transformers, tokenizer and all:
    python -m tools.convert gemma-3-270m-Q4_K_M.gguf gemma3_270m

  What LoRA trained, for PEFT:
    python -m tools.convert runs/mine/tuned/adapters my_adapters

  A Gemma, or the decoder of a trained bundle, for llama.cpp:
    python -m tools.convert gemma-3-270m gemma.gguf
    python -m tools.convert runs/mine/multimodal/bundle decoder.gguf --precision=F16

The formats are recognised: SRC is a bundle, an .npz (or FILE.npz:SUBTREE), a .gguf or a folder with config.json and
safetensors files; DST is an .npz or a .gguf if its name ends so, a Hugging Face folder if SRC is a bundle or a .gguf,
a folder of PEFT if SRC is the adapters of a LoRA stage, else a bundle.

The same in Python: big_vlm.bundle.convert(SRC, DST)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command.parser('convert', __doc__, EXAMPLES)
    result.add_argument('source', metavar='SRC', help='what to convert')
    result.add_argument('destination', metavar='DST', help='a name that is free')
    result.add_argument('--to', default='', metavar='FORMAT', help='bundle, npz, hugging_face or gguf')
    result.add_argument('--tokenizer', default='', metavar='FILE', help='SentencePiece model, if SRC comes without')
    result.add_argument('--image_size', type=int, default=0, metavar='PX', help='another resolution')
    ways = 'bilinear (as big_vision; default), bicubic (as Hugging Face; its default), antialiased (as NaFlex)'
    result.add_argument('--resize', default='', metavar='HOW', help=f'of position embeddings: {ways}')
    result.add_argument('--precision', default='', metavar='TYPE', help='of a .gguf: F32 (default), F16, BF16 or Q8_0')
    result.add_argument('--per_layer', action='store_true', help='write an .npz layer by layer, as SigLIP 1 is')
    return result


def give_memory_back() -> None:
    """Lets glibc return the pages of every array as it goes, and not keep them for one of another size."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


def run(argv: list[str]) -> None:
    """The tool. Raises UserError."""
    args = parser().parse_args(argv)
    give_memory_back()
    import tqdm

    from big_vlm import bundle
    from big_vlm.config import UserError

    if args.image_size < 0:
        raise UserError(f'--image_size={args.image_size}: must be a number of pixels')

    told = []
    # Orbax's threads log, traceback and all, what is raised here as well and becomes one line.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    with tqdm.tqdm(unit='B', unit_scale=True, desc=args.destination, disable=None, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = bundle.convert(
            args.source,
            args.destination,
            to=args.to,
            tokenizer=args.tokenizer,
            image_size=args.image_size,
            resize=args.resize,
            per_layer=args.per_layer,
            precision=args.precision,
            progress=progress,
            say=told.append,
        )
    print(f'{args.destination}: {written}', *told, sep='\n')


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr that says what to do."""
    return command.end(run, argv)


if __name__ == '__main__':
    sys.exit(main())
