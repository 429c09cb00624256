"""The other side of a comparison: Hugging Face's own code on a folder, its states caught by hooks on its modules."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np

from big_vlm.checks.states import Tokens
from big_vlm.config import UserError
from big_vlm.interop import pretrained

_CLASSES = {
    'siglip': 'SiglipModel',
    'paligemma': 'PaliGemmaForConditionalGeneration',
    'gemma': 'GemmaForCausalLM',
    'gemma2': 'Gemma2ForCausalLM',
    'gemma3_text': 'Gemma3ForCausalLM',
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


class TransformersOracle:
    """A folder as transformers reads it: processor, tokenizer, model in float32 with eager attention.

    Args:
      folder: with config.json and safetensors; never code of its own, never a pickled file.
      model: what `interop` reads in the folder.

    Raises:
      UserError: torch or transformers is not installed.
    """

    def __init__(self, folder: pathlib.Path, model: pretrained.Pretrained):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"the oracle is transformers, and {error.name} is not installed: pip install -e '.[parity]', or compare "
                'with our own code on the weights of the other side, --oracle=big_vlm'
            ) from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name = f'transformers {transformers.__version__}'
        self._folder, self._model = folder, model
        self._network = getattr(transformers, _CLASSES[model.family]).from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager', use_safetensors=True, local_files_only=True
        )
        self._network.train(False)

    def pixels(self, image: np.ndarray) -> np.ndarray | None:
        """float32 [image_size,image_size,3]; None if the folder has no image processor."""
        files = ('preprocessor_config.json', 'processor_config.json')
        if not any((self._folder / name).is_file() for name in files):
            return None
        values = self._image_processor()([image], return_tensors='np')['pixel_values'][0]
        return np.asarray(values, np.float32).transpose(1, 2, 0)

    def tokens(self, prompt: str, answer: str) -> Tokens | None:
        """As `Side.tokens`; None if the folder has no tokenizer, or of a PaliGemma no image processor."""
        import transformers

        if not (self._folder / 'tokenizer_config.json').is_file():
            return None
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        if self._model.family in pretrained.TOWERS:
            length = self._model.settings.text_length
            ids = tokenizer(prompt, padding='max_length', max_length=length, truncation=True).input_ids
            return _tokens(ids, np.zeros(len(ids)))
        if self._model.family in pretrained.DECODERS:
            ids = tokenizer(prompt).input_ids
            return _tokens(ids, np.ones(len(ids)))
        size = self._model.settings.image_size
        if self.pixels(image := np.zeros((size, size, 3), np.uint8)) is None:
            return None
        processor = transformers.PaliGemmaProcessor(self._image_processor(), tokenizer)
        [row], [types] = (
            processor(images=[image], text=[f'<image>{prompt}'], suffix=[answer])[name]
            for name in ('input_ids', 'token_type_ids')
        )
        row = np.asarray(row)
        return _tokens(np.where(row == self._network.config.image_token_id, -1, row), types)

    def states(self, image: np.ndarray | None, tokens: Tokens) -> dict[str, np.ndarray]:
        """Stage → float32 array, as `Side.states` has them."""
        import torch

        found: dict[str, np.ndarray] = {}
        handles = [
            module.register_forward_hook(_keep(found, stage))
            for name, module in self._network.named_modules()
            if (stage := _stage(name))
        ]
        slots = int(np.sum(tokens.ids < 0))
        for name, module in self._network.named_modules():
            if _stage(name) == 'decoder layer 0':
                handles.append(module.register_forward_pre_hook(_keep_input(found, slots), with_kwargs=True))
        ids = torch.tensor(np.where(tokens.ids < 0, self._model.vocab_size, tokens.ids))[None].long()
        inputs: dict[str, Any] = {'input_ids': ids}
        if image is not None:
            inputs['pixel_values'] = torch.tensor(image.transpose(2, 0, 1))[None]
        if self._model.family == 'paligemma':
            # Without token types, release 5 would be causal throughout.
            types = torch.tensor(tokens.answer)[None].long()
            inputs |= {'attention_mask': torch.ones_like(ids), 'token_type_ids': types}
        try:
            with torch.no_grad():
                out = self._network(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if self._model.family in pretrained.TOWERS:
            found['image embedding'], found['text embedding'] = _array(out.image_embeds), _array(out.text_embeds)
            found['logits'] = _array(out.logits_per_image)
        else:
            found['logits'] = _array(out.logits)[max(slots - 1, 0) :, : self._model.vocab_size]
        return found

    def _image_processor(self):
        import transformers

        # Pillow's resize: torchvision's differs from it by a grey level here and there.
        return transformers.AutoImageProcessor.from_pretrained(self._folder, backend='pil', local_files_only=True)


def _stage(module: str) -> str | None:
    for pattern, stage in _OUTPUTS:
        if match := re.fullmatch(rf'(?:.*\.)?{pattern}', module):
            return stage.format(*match.groups())
    return None


def _keep(found, stage):
    def hook(module, inputs, output):
        x = _array(output[0] if isinstance(output, tuple) else output)
        # A convolution's [D, h, w] as patches [P, D].
        found[stage] = x.reshape(len(x), -1).T if stage == 'image patches' else x

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
