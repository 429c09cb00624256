"""Vision-language models in JAX: SigLIP dual encoders and PaliGemma decoders, from pretraining to answers."""

from typing import Any

__version__ = '0.1.0'
__all__ = ['__version__', 'load']


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package (for its version, for a tool's --help) imports no jax.
    if name == 'load':
        from big_vlm.bundle import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted([*globals(), 'load'])
