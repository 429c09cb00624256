"""Our models against Hugging Face's, on random weights: every embedding and logit within 2e-5 of the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hugging_face_weights import decoder, dense, encoder, image_tower, image_tower_of_patches, map_head, weights

from big_vlm.data import naflex
from big_vlm.data.contract import Contract
from big_vlm.models import gemma, naflex_vit, paligemma, text_towers, two_towers, vit
from tools.make_goldens import randomize

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

D, LAYERS, HEADS, F, PATCH = 24, 3, 4, 40, 4  # image and text encoders
W, N, H, FF = 32, 4, 8, 56  # decoder
TOLERANCE = 2e-5


def close(got, expected):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


ENCODER = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
OURS = dict(width=D, depth=LAYERS, mlp_dim=F, num_heads=HEADS)
VISION = ENCODER | dict(image_size=14, patch_size=PATCH)  # 14 pixels hold three patches of 4, two pixels go unseen
DECODER = dict(hidden_size=W, intermediate_size=FF, num_hidden_layers=LAYERS, num_attention_heads=N, head_dim=H)


def same_structure(params, init):
    expected = jax.eval_shape(init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize('embed_dim', [D, 20])
def test_siglip(embed_dim):
    text_config = ENCODER | dict(vocab_size=60, max_position_embeddings=7, projection_size=embed_dim)
    text_config |= dict(bos_token_id=None, eos_token_id=1, pad_token_id=1)
    if embed_dim != D:
        # SigLIP has no image head: the text tower is the wider or narrower one and projects to the image's width.
        text_config |= dict(projection_size=D, hidden_size=embed_dim)
    theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text_config, vision_config=VISION))
    theirs, rng = randomize(theirs), np.random.default_rng(1)
    sd = weights(theirs)
    params = {
        'img': image_tower(sd, 'vision_model', theirs.config.vision_config)
        | {'MAPHead_0': map_head(sd, 'vision_model.head', theirs.config.vision_config)},
        'txt': {
            'Embed_0': {'embedding': sd['text_model.embeddings.token_embedding.weight']},
            'pos_embedding': sd['text_model.embeddings.position_embedding.weight'][None],
            'Encoder_0': encoder(sd, 'text_model.encoder', 'text_model.final_layer_norm', theirs.config.text_config),
            'head': dense(sd, 'text_model.head'),
        },
        't': sd['logit_scale'],
        'b': sd['logit_bias'],
    }
    text_tower = text_towers.TextTransformer(60, 'mu', embed_dim=D, **(OURS | dict(width=embed_dim)))
    ours = two_towers.TwoTowers(vit.ViT(f'mu/{PATCH}', **OURS), text_tower, image_size=14, text_length=7)
    same_structure(params, ours.init)
    image = 0.1 * rng.normal(size=(3, 14, 14, 3)).astype(np.float32)
    text = rng.integers(2, 60, (3, 7))
    text[1, 3:] = 1  # padding, which SigLIP attends to
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(text), pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)))
        image_out = theirs.vision_model(torch.tensor(image.transpose(0, 3, 1, 2)), output_hidden_states=True)
        text_out = theirs.text_model(torch.tensor(text), output_hidden_states=True)
    zimg, ztxt, ours_out = jax.jit(ours.apply)(params, image, text.astype(np.int32))
    for i in range(LAYERS):
        close(ours_out['img/blocks'][i], image_out.hidden_states[i + 1])
        close(ours_out['txt/blocks'][i], text_out.hidden_states[i + 1])
    close(ours_out['img/encoded'], image_out.last_hidden_state)
    close(ours_out['txt/encoded'], text_out.last_hidden_state)
    close(zimg, out.image_embeds)
    close(ztxt, out.text_embeds)
    close(zimg @ ztxt.T * jnp.exp(params['t']) + params['b'], out.logits_per_image)


def test_siglip2_naflex():
    """Pictures of several shapes and numbers of patches, through both preprocessings and both models."""
    from transformers.models.siglip2 import image_processing_pil_siglip2

    text_config = ENCODER | dict(vocab_size=60, max_position_embeddings=7, bos_token_id=None, eos_token_id=1)
    vision = ENCODER | dict(patch_size=PATCH, num_patches=256)
    theirs = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text_config, vision_config=vision))
    theirs, rng = randomize(theirs), np.random.default_rng(1)
    sd = weights(theirs)
    image = image_tower_of_patches(sd, 'vision_model', theirs.config.vision_config)
    params = {
        'img': image | {'MAPHead_0': map_head(sd, 'vision_model.head', theirs.config.vision_config)},
        'txt': {
            'Embed_0': {'embedding': sd['text_model.embeddings.token_embedding.weight']},
            'pos_embedding': sd['text_model.embeddings.position_embedding.weight'][None],
            'Encoder_0': encoder(sd, 'text_model.encoder', 'text_model.final_layer_norm', theirs.config.text_config),
            'head': dense(sd, 'text_model.head'),
        },
        't': sd['logit_scale'],
        'b': sd['logit_bias'],
    }
    count = 20
    text_tower = text_towers.TextTransformer(60, 'mu', embed_dim=D, **OURS)
    tower = naflex_vit.NaFlexViT(f'mu/{PATCH}', **OURS)
    ours = two_towers.TwoTowers(tower, text_tower, image_size=14, text_length=7, max_patches=count)
    same_structure(params, ours.init)
    settings = dict(max_patches=count, patch_size=PATCH)
    contract = Contract(224, 'bilinear', True, (-1.0, 1.0), 7, True, True, '\n', (), 0, 60, 0, 2, 1, '', **settings)
    shapes = [(40, 30), (16, 90), (90, 16), (11, 11), (6, 200)]
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    made = [naflex.rows(picture, contract) for picture in pictures]
    patches, mask, grid = (np.stack([row[name] for row in made]) for name in ('patches', 'patch_mask', 'patch_grid'))
    patches = (patches / 127.5 - 1).astype(np.float32)
    processor = image_processing_pil_siglip2.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=count)
    processed = processor(pictures, return_tensors='np')
    np.testing.assert_array_equal(processed['spatial_shapes'], grid)
    np.testing.assert_array_equal(processed['pixel_attention_mask'], mask)
    np.testing.assert_allclose(processed['pixel_values'][mask], patches[mask], atol=1e-6)
    text = rng.integers(2, 60, (5, 7))
    inputs = dict(
        pixel_values=torch.tensor(patches), pixel_attention_mask=torch.tensor(mask), spatial_shapes=torch.tensor(grid)
    )
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(text), **inputs)
        image_out = theirs.vision_model(**inputs, output_hidden_states=True)
        text_out = theirs.text_model(torch.tensor(text), output_hidden_states=True)
    zimg, ztxt, ours_out = jax.jit(ours.apply)(params, (patches, mask, grid), text.astype(np.int32))
    close(ours_out['img/stem'], theirs.vision_model.embeddings.patch_embedding(torch.tensor(patches)))
    for i in range(LAYERS):
        close(np.asarray(ours_out['img/blocks'][i])[mask], image_out.hidden_states[i + 1][torch.tensor(mask)])
        close(ours_out['txt/blocks'][i], text_out.hidden_states[i + 1])
    close(np.asarray(ours_out['img/encoded'])[mask], image_out.last_hidden_state[torch.tensor(mask)])
    close(ours_out['img/pooled'], image_out.pooler_output)
    close(zimg, out.image_embeds)
    close(ztxt, out.text_embeds)
    close(zimg @ ztxt.T * jnp.exp(params['t']) + params['b'], out.logits_per_image)


def make_gemma(kv_heads, vocab=60):
    return gemma.Gemma(vocab, width=W, depth=LAYERS, mlp_dim=FF, num_heads=N, num_kv_heads=kv_heads, head_dim=H)


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_gemma(kv_heads):
    config = transformers.GemmaConfig(**DECODER, num_key_value_heads=kv_heads, vocab_size=60)
    theirs, ours = randomize(transformers.GemmaForCausalLM(config)), make_gemma(kv_heads)
    params = decoder(weights(theirs), 'model', config)
    same_structure(params, lambda rng: gemma.init(ours, rng))
    tokens = np.random.default_rng(1).integers(0, 60, (2, 9))
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_hidden_states=True)
    mask = np.broadcast_to(np.tril(np.ones((9, 9), bool)), (2, 9, 9))
    position = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))

    @jax.jit
    def forward(params):
        embedded = gemma.embed(ours, params, tokens.astype(np.int32))
        x, out = ours.apply({'params': params}, embedded, position, mask)
        return embedded, out['blocks'], gemma.logits(ours, params, x)

    embedded, blocks, logits = forward(params)
    close(embedded, out.hidden_states[0])
    for i in range(LAYERS - 1):  # their last hidden state is after the final norm
        close(blocks[i], out.hidden_states[i + 1])
    close(logits, out.logits)


@pytest.mark.parametrize('kv_heads', [1, 4])
def test_paligemma_forward_and_greedy_decoding(kv_heads):
    patches, image_token = 9, 60
    config = transformers.PaliGemmaConfig(
        vision_config=dict(model_type='siglip_vision_model', vision_use_head=False, projection_dim=W, **VISION),
        text_config=dict(model_type='gemma', **DECODER, num_key_value_heads=kv_heads, vocab_size=61),
        projection_dim=W,
        image_token_index=image_token,
    )
    theirs = randomize(transformers.PaliGemmaForConditionalGeneration(config))
    sd = weights(theirs)
    params = {
        'img': image_tower(sd, 'model.vision_tower', config.vision_config)
        | {'head': dense(sd, 'model.multi_modal_projector.linear')},
        'llm': decoder(sd, 'model.language_model', config.text_config),
    }
    image_model = vit.ViT(f'mu/{PATCH}', pool='none', head=W, **OURS)
    ours = paligemma.PaliGemma(image_model, make_gemma(kv_heads, 61), image_size=14)
    same_structure(params, ours.init)

    rng = np.random.default_rng(1)
    image = 0.1 * rng.normal(size=(2, 1, 14, 14, 3)).astype(np.float32)
    pixels = torch.tensor(image[:, 0].transpose(0, 3, 1, 2))
    # Prompts of 5 and 3 tokens, suffixes of 4, padded on the right to the same length.
    prompts, suffix = np.array([5, 3]), rng.integers(2, 60, (2, 4))
    slots = np.arange(patches + 9)[None]
    start = patches + prompts[:, None]
    text = rng.integers(2, 60, (2, patches + 9))
    for row in range(2):
        text[row, start[row, 0] : start[row, 0] + 4] = suffix[row]
    real, ar = slots < start + 4, (slots >= start) & (slots < start + 4)
    text = np.where(slots < patches, -1, np.where(real, text, 0)).astype(np.int32)
    position = np.broadcast_to(slots, text.shape).astype(np.int32)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(np.where(text < 0, image_token, text)).long(),
            pixel_values=pixels,
            attention_mask=torch.tensor(real).long(),
            token_type_ids=torch.tensor(ar).long(),
        )
    rows = text, real.astype(np.int32), position, ar.astype(np.int32)
    logits, ours_out = jax.jit(lambda p: ours.apply(p, image, None, *rows))(params)
    close(
        ours.img.apply({'params': params['img']}, image[:, 0])[0], theirs.model.get_image_features(pixels).pooler_output
    )
    expected = out.logits.numpy()
    for row in range(2):
        close(logits[row][real[row]], expected[row][real[row]])

    # The same answers, token by token: prefill, then one step each.
    unstacked = paligemma.unstack_layers(params)
    prompt = slots < start
    rows = np.where(prompt, text, 0), prompt.astype(np.int32), position, np.zeros_like(text)
    step_logits, cache = jax.jit(lambda p: ours.prefill(p, image, None, *rows, cache_size=24))(unstacked)
    step = jax.jit(ours.decode_step)
    for i in range(5):
        close(step_logits, np.stack([expected[row, start[row, 0] - 1 + i] for row in range(2)]))
        if i < 4:
            step_logits, cache = step(unstacked, suffix[:, i].astype(np.int32), cache)
    # Greedy tokens of each row alone, as `generate` gives them.
    for row in range(2):
        ids = torch.tensor(np.where(text < 0, image_token, text)[row, : start[row, 0]])[None].long()
        with torch.no_grad():
            answer = theirs.generate(
                input_ids=ids,
                pixel_values=pixels[row : row + 1],
                attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids),
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
            )[0, ids.shape[1] :]
        one = tuple(x[row : row + 1, : start[row, 0]] for x in rows)
        row_image = image[row : row + 1]
        logits, cache = ours.prefill(unstacked, row_image, None, *one, cache_size=24)
        tokens = []
        for _ in range(6):
            # min_new_tokens forbids eos.
            tokens.append(int(np.argmax(np.asarray(logits)[0] + np.where(np.arange(61) == 1, -np.inf, 0))))
            logits, cache = step(unstacked, np.array(tokens[-1:], np.int32), cache)
        assert tokens == answer.tolist()
