"""The other side of a comparison: Hugging Face's own code on a folder, its states caught by hooks on its modules."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from big_vlm.checkpoints import trees
from big_vlm.checks.states import Tokens, rows_of
from big_vlm.config import UserError
from big_vlm.data import naflex
from big_vlm.interop import pretrained
from big_vlm.models.image_towers import naflex_patch_size

_CLASSES = {  # by config.json's model_type
    'siglip': 'SiglipModel',
    'siglip2': 'Siglip2Model',
    'paligemma': 'PaliGemmaForConditionalGeneration',
    'gemma': 'GemmaForCausalLM',
    'gemma2': 'Gemma2ForCausalLM',
    'gemma3_text': 'Gemma3ForCausalLM',
    'gemma3': 'Gemma3ForConditionalGeneration',
}
_VISION, _TEXT, _LLM = r'vision_(?:model|tower)(?:\.vision_model)?\.', r'text_model\.', r'(?:language_model|model)\.'
# A module, below whatever prefix a release gives it, and the stage that its output is.
_OUTPUTS = (
    (_VISION + r'embeddings\.patch_embedding', 'image patches'),
    (_VISION + r'embeddings', 'image positions'),
    (_VISION + r'encoder\.layers\.(\d+)', 'image layer {}'),
    (_VISION + r'post_layernorm', 'image norm'),
    (_VISION + r'head', 'image pooled'),
    (r'multi_modal_projector', 'image projected'),
    (_TEXT + r'embeddings\.token_embedding', 'text tokens'),
    (_TEXT + r'embeddings', 'text positions'),
    (_TEXT + r'encoder\.layers\.(\d+)', 'text layer {}'),
    (_TEXT + r'final_layer_norm', 'text norm'),
    (_TEXT + r'head', 'text projected'),
    (_LLM + r'layers\.(\d+)', 'decoder layer {}'),
    (_LLM + r'norm', 'decoder norm'),
)


@dataclasses.dataclass(frozen=True)
class TransformersOracle:
    """A folder as transformers reads it. Made by `load`.

    Attributes:
      name: 'transformers' and its version.
      folder: with config.json, safetensors and, where there are any, the files of processor and tokenizer.
      model: what `interop` reads in the folder.
      network: the torch module, in float32.
    """

    name: str
    folder: pathlib.Path
    model: pretrained.Pretrained
    network: Any

    def pixels(self, image: np.ndarray) -> np.ndarray | None:
        """As `Side.pixels`; None if the folder has no image processor."""
        processor = _image_processor(self.folder)
        if processor is None:
            return None
        made = processor([image], return_tensors='np')
        values = np.asarray(made['pixel_values'][0], np.float32)
        if 'spatial_shapes' in made:
            return naflex.picture(values, made['spatial_shapes'][0])
        return values.transpose(1, 2, 0)

    def tokens(self, prompt: str, answer: str) -> Tokens | None:
        """As `Side.tokens`; None if the folder has no tokenizer, or of a PaliGemma no image processor."""
        tokenizer = _tokenizer(self.folder)
        if tokenizer is None:
            return None
        if self.model.family in pretrained.TOWERS:
            length = self.model.settings.text_length
            ids = tokenizer(prompt, padding='max_length', max_length=length, truncation=True).input_ids
            return _tokens(ids, np.zeros(len(ids)))
        if self.model.family in pretrained.DECODERS:
            ids = tokenizer(prompt).input_ids
            return _tokens(ids, np.ones(len(ids)))
        processor = _image_processor(self.folder)
        if processor is None:
            return None
        size = self.model.settings.image_size
        row = _paligemma_row(processor, tokenizer, np.zeros((size, size, 3), np.uint8), prompt, answer)
        ids = np.asarray(row['input_ids'][0])
        # `<image>` is the first id beyond the tokens.
        return _tokens(np.where(ids == self.model.vocab_size, -1, ids), row['token_type_ids'][0])

    def states(self, image: np.ndarray | None, tokens: Tokens) -> dict[str, np.ndarray]:
        """Stage → float32 array, as `Side.states` has them."""
        slots = int(np.sum(tokens.ids < 0))
        ids = np.where(tokens.ids < 0, self.model.vocab_size, tokens.ids)
        inputs = {'input_ids': ids.astype(np.int64)}
        if patch_size := naflex_patch_size(self.model.model, self.model.settings):
            rows = rows_of(image, patch_size)
            inputs |= dict(zip(('pixel_values', 'pixel_attention_mask', 'spatial_shapes'), rows, strict=True))
        elif image is not None:
            inputs['pixel_values'] = image.transpose(2, 0, 1)
        if self.model.family == 'paligemma':
            # Without token types, release 5 would be causal throughout.
            inputs |= {'attention_mask': np.ones_like(ids), 'token_type_ids': tokens.answer.astype(np.int64)}
        found: dict[str, np.ndarray] = {}
        out = _run(self.network, inputs, found, slots)
        if self.model.family in pretrained.TOWERS:
            found['image embedding'], found['text embedding'] = _array(out.image_embeds), _array(out.text_embeds)
            found['logits'] = _array(out.logits_per_image)
        else:
            found['logits'] = _array(out.logits)[max(slots - 1, 0) :, : self.model.vocab_size]
        return found


def require() -> None:
    """Raises UserError, with what to install, if torch or transformers is not there."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the oracle is transformers, and {error.name} is not installed: pip install -e '.[parity]', or take our "
            'own code on the weights of the other side, --oracle=big_vlm'
        ) from None


def load(folder: pathlib.Path, model: pretrained.Pretrained) -> TransformersOracle:
    """The model in a folder, which `interop` reads as `model`. Attention is eager: SDPA's rounding is another one.

    No code of the folder's own is run, and no pickled file read.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = dict(dtype=torch.float32, attn_implementation='eager', use_safetensors=True)
    network = _read(getattr(transformers, _CLASSES[model.decoder_of or model.family]), folder, **options)
    return TransformersOracle(f'transformers {transformers.__version__}', folder, model, network.train(False))


def _image_processor(folder):
    import transformers

    if not any((folder / name).is_file() for name in ('preprocessor_config.json', 'processor_config.json')):
        return None
    # Pillow's resize, as published; torchvision's differs by a grey level here and there.
    return _read(transformers.AutoImageProcessor, folder, backend='pil')


def _tokenizer(folder):
    import transformers

    if not (folder / 'tokenizer_config.json').is_file():
        return None
    return _read(transformers.AutoTokenizer, folder)


def _read(kind, folder, **options):
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f'{folder}: transformers cannot read it: {trees.one_line(error)}') from error


def _paligemma_row(image_processor, tokenizer, image, prompt, answer):
    import transformers

    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    return processor(images=[image], text=[f'<image>{prompt}'], suffix=[answer])


def _run(network, inputs, found, slots):
    """The output for one example; `found` gets the states. `slots`: leading ones that hold an image."""
    import torch

    handles = []
    for name, module in network.named_modules():
        if stage := _stage(name):
            handles.append(module.register_forward_hook(_keep(found, stage)))
        if stage == 'decoder layer 0':
            handles.append(module.register_forward_pre_hook(_keep_input(found, slots), with_kwargs=True))
    try:
        with torch.no_grad():
            return network(**{name: torch.tensor(x)[None] for name, x in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()


def _stage(module: str) -> str | None:
    for pattern, stage in _OUTPUTS:
        if match := re.fullmatch(rf'(?:.*\.)?{pattern}', module):
            return stage.format(*match.groups())
    return None


def _keep(found, stage):
    def hook(module, inputs, output):
        x = _array(output[0] if isinstance(output, tuple) else output)
        # A convolution's [D, h, w] as patches [P, D].
        found[stage] = x.reshape(len(x), -1).T if stage == 'image patches' and x.ndim == 3 else x

    return hook


def _keep_input(found, slots):
    def hook(module, args, kwargs):
        x = _array(args[0] if args else kwargs['hidden_states'])
        if slots:
            found['decoder image slots'] = x[:slots]
        found['decoder text slots'] = x[slots:]

    return hook


def _array(x) -> np.ndarray:
    """The one example of a batch."""
    return x.detach().float().numpy()[0]


def _tokens(ids, answer) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), np.asarray(answer, np.int32))
