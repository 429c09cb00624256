"""PEFT's folders of adapters: theirs and ours, round trip, and the sum; with the parity marker, through PEFT itself."""

import dataclasses
import json
from pathlib import Path

import einops
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from big_vlm import bundle, config, interop
from big_vlm.bundle import adapters as folders
from big_vlm.checkpoints import trees
from big_vlm.config import UserError
from big_vlm.interop import hugging_face, peft, rows
from big_vlm.models import lora
from tools import convert

GOLDENS = Path(__file__).parents[1] / 'goldens'
RULES = (
    ('llm/layers/attn/.*', dict(rank=2, alpha=6.0)),
    ('(llm|img)/.*(mlp|Dense|query|out|head).*', dict(rank=3, alpha=3.0)),
)


def model_of(name):
    """(stage, path → float32 array) of a tiny public checkpoint."""
    public = interop.read(GOLDENS / name)
    stage = config.Stage(task=public.task, total=config.Duration(steps=1), model=public.model, contract=public.settings)
    return stage, {path: public.weights.read(path).astype(np.float32) for path in public.weights.shapes}


@pytest.fixture(scope='module')
def tuned():
    """(stage, weights, adapters) of a PaliGemma with random factors."""
    stage, weights = model_of('paligemma')
    section = config.parse_stage({**config.to_dict(stage), 'lora': dict(rules=RULES)}, trained=False).lora
    params = trees.flat(lora.add(trees.nested(weights), section, jax.random.key(0)))
    rng = np.random.default_rng(0)
    adapters = {p: np.asarray(x) for p, x in params.items() if lora.is_adapter(p)}
    adapters |= {p: rng.normal(size=x.shape).astype(np.float32) for p, x in adapters.items() if p.endswith(lora.B)}
    return stage, weights, adapters


def test_round_trip(tuned, tmp_path):
    stage, weights, adapters = tuned
    peft.write(tmp_path / 'peft', adapters, stage, base='some/model')
    settings = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
    assert settings['base_model_name_or_path'] == 'some/model' and len(settings['rank_pattern']) > 1
    (tmp_path / 'peft' / 'adapter_config.json').write_text(json.dumps(settings | {'init_lora_weights': 'gaussian'}))
    found = peft.read(tmp_path / 'peft', stage, weights)
    assert set(found) == set(adapters)
    for path, leaf in adapters.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=path)
    with pytest.raises(UserError, match='exists'):
        peft.write(tmp_path / 'peft', adapters, stage)


def test_of_a_decoder_alone(tmp_path):
    stage, weights = model_of('gemma')
    stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, projector='none'))
    section = config.parse_stage({**config.to_dict(stage), 'lora': dict(rules=RULES[:1])}, trained=False).lora
    params = trees.flat(lora.add(trees.nested(weights), section, jax.random.key(0)))
    peft.write(tmp_path / 'peft', {p: np.asarray(x) for p, x in params.items() if lora.is_adapter(p)}, stage)
    names = load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
    assert 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' in names
    assert all(name.startswith('base_model.model.model.layers.') for name in names)
    assert set(peft.read(tmp_path / 'peft', stage, weights)) == {p for p in params if lora.is_adapter(p)}


def test_what_a_stage_leaves_becomes_a_folder_of_peft(tuned, tmp_path):
    stage, weights, factors = tuned
    section = config.to_dict(stage) | dict(
        lora=dict(rules=RULES), data=dict(sources={'a': dict(dataset='b', split='c')})
    )
    tuned = config.parse_stage(section)
    folders.save(tmp_path / 'adapters', trees.nested(weights | factors), tuned)
    assert convert.main([str(tmp_path / 'adapters'), str(tmp_path / 'peft')]) == 0
    found = folders.read(tmp_path / 'peft', stage, weights)
    assert set(found) == set(factors)
    for path, leaf in folders.read(tmp_path / 'adapters', stage, weights).items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=path)
    with pytest.raises(UserError, match='become a folder of PEFT as they are'):
        bundle.convert(tmp_path / 'adapters', tmp_path / 'other', to='npz')
    more = dataclasses.replace(tuned, lora=dataclasses.replace(tuned.lora, train=('img/head/.*',)))
    folders.save(tmp_path / 'adapters', trees.nested(weights | factors), more)
    with pytest.raises(UserError, match='img/head/.* was trained as well'):
        bundle.convert(tmp_path / 'adapters', tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_their_product_is_ours(tuned, tmp_path):
    """alpha / r · B A of a few of their layers, against our merged matrices."""
    stage, weights, adapters = tuned
    peft.write(tmp_path / 'peft', adapters, stage)
    theirs = load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
    merged = trees.flat(lora.merge(trees.nested(weights | adapters)))
    layer, tower = 'model.language_model.layers.1', 'model.vision_tower.encoder.layers.1'
    for name, path, at, how, scale in [
        (f'{layer}.self_attn.q_proj', 'llm/layers/attn/q_einsum/w', (1,), 'N D H -> (N H) D', 3.0),
        (f'{layer}.self_attn.v_proj', 'llm/layers/attn/kv_einsum/w', (1, 1), 'K D H -> (K H) D', 3.0),
        (f'{layer}.self_attn.o_proj', 'llm/layers/attn/attn_vec_einsum/w', (1,), 'N H D -> D (N H)', 3.0),
        (f'{layer}.mlp.up_proj', 'llm/layers/mlp/gating_einsum', (1, 1), 'D F -> F D', 1.0),
        (
            f'{tower}.self_attn.q_proj',
            'img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel',
            (1,),
            'D N H -> (N H) D',
            1.0,
        ),
        ('model.multi_modal_projector.linear', 'img/head/kernel', (), 'D E -> E D', 1.0),
    ]:
        a, b = (theirs[f'base_model.model.{name}.lora_{x}.weight'] for x in 'AB')
        delta = einops.rearrange(np.asarray(merged[path][at]) - weights[path][at], how)
        np.testing.assert_allclose(delta, scale * b @ a, atol=1e-5, err_msg=name)


def test_of_queries_and_values_alone_the_keys_stay(tuned, tmp_path):
    """PEFT's usual choice; older names, a rank of its own, and rank-stabilised scales."""
    stage, weights, _ = tuned
    rng = np.random.default_rng(0)
    heads, width = weights['llm/layers/attn/q_einsum/w'].shape[1:3]
    head_dim = weights['llm/layers/attn/q_einsum/w'].shape[3]
    tensors = {}
    for name, out, rank in (('q_proj', heads * head_dim, 4), ('v_proj', head_dim, 2)):
        prefix = f'base_model.model.language_model.model.layers.0.self_attn.{name}'
        tensors[f'{prefix}.lora_A.weight'] = rng.normal(size=(rank, width)).astype(np.float32)
        tensors[f'{prefix}.lora_B.weight'] = rng.normal(size=(out, rank)).astype(np.float32)
    settings = dict(peft_type='LORA', r=4, lora_alpha=8, rank_pattern={'v_proj': 2}, use_rslora=True)
    (tmp_path / 'adapter_config.json').write_text(json.dumps(settings))
    save_file(tensors, tmp_path / 'adapter_model.safetensors')
    merged = trees.flat(lora.merge(trees.nested(weights | peft.read(tmp_path, stage, weights))))
    kv, q = 'llm/layers/attn/kv_einsum/w', 'llm/layers/attn/q_einsum/w'
    np.testing.assert_array_equal(merged[kv][0, 0], weights[kv][0, 0])
    np.testing.assert_array_equal(merged[q][1], weights[q][1])
    for path, at, name, scale in ((q, (0,), 'q_proj', 8 / 2), (kv, (0, 1), 'v_proj', 8 / 2**0.5)):
        a, b = (
            tensors[f'base_model.model.language_model.model.layers.0.self_attn.{name}.lora_{x}.weight'] for x in 'AB'
        )
        delta = einops.rearrange(np.asarray(merged[path][at]) - weights[path][at], 'N D H -> (N H) D')
        np.testing.assert_allclose(delta, scale * b @ a, atol=1e-4)


@pytest.mark.parametrize(
    ('settings', 'rename', 'message'),
    [
        (dict(peft_type='IA3'), {}, "peft_type is 'IA3', only LORA"),
        (dict(use_dora=True), {}, 'use_dora is True'),
        (
            dict(alora_invocation_tokens=[7, 8]),
            {},
            r'alora_invocation_tokens is \[7, 8\], and only None or \[\] is read',
        ),
        (dict(use_qalora=True), {}, 'use_qalora is True'),
        (dict(layer_replication=[[0, 1], [0, 1]]), {}, 'layer_replication is '),
        # These take their factors out of the matrix that they are added to.
        (dict(init_lora_weights='olora'), {}, "init_lora_weights is 'olora', and only True or False or None or 'gau"),
        (dict(init_lora_weights='pissa_niter_4'), {}, "init_lora_weights is 'pissa_niter_4'"),
        (dict(init_lora_weights=['loftq']), {}, 'init_lora_weights is '),
        ({}, {'layers.0': 'layers.9'}, r'adapters of language_model\.model\.layers\.9.*which this model does not have'),
        ({}, {'lora_B': 'lora_embedding_B'}, 'is no factor of a linear layer'),
        ({}, {'drop': 'lora_B'}, 'only one factor is there'),
        ({}, {'cut': 'lora_A'}, 'factors of another model'),
    ],
)
def test_folders_that_do_not_fit(tuned, tmp_path, settings, rename, message):
    stage, weights, adapters = tuned
    peft.write(tmp_path / 'peft', adapters, stage)
    file = tmp_path / 'peft' / 'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    file = tmp_path / 'peft' / 'adapter_model.safetensors'
    tensors = {}
    for name, x in load_file(file).items():
        if rename.get('drop', '-') in name:
            continue
        x = x[:, :-1].copy() if rename.get('cut', '-') in name else x
        for old, new in rename.items():
            name = name.replace(old, new)
        tensors[name] = x
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path / 'peft', stage, weights)


def test_a_folder_of_something_else(tuned, tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match='has no adapter_model.safetensors: copy it whole'):
        peft.read(tmp_path, tuned[0], tuned[1])


def theirs(settings=None, folder=None):
    """(published name → merged array, the model with adapters) of PEFT's adapters: fresh, or those of a folder."""
    peft_library, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(GOLDENS / 'paligemma', dtype=torch.float32)
    if settings is None:
        model = peft_library.PeftModel.from_pretrained(model, str(folder))
    else:
        model = peft_library.get_peft_model(model, peft_library.LoraConfig(**settings))
        model.save_pretrained(str(folder))
    state = model.merge_and_unload().state_dict()
    return {hugging_face.published_name(name, 'paligemma'): x.detach().numpy() for name, x in state.items()}


def check_merged(stage, merged, state):
    count = 0
    for row in hugging_face.table_of('paligemma', stage.model):
        ours = np.asarray(merged[row.our_name])
        for i, name in rows._layers(row, ours):
            expected = row.to_theirs(ours[row.index(i)])
            np.testing.assert_allclose(state[name][: len(expected)], expected, atol=1e-6, err_msg=name)
            count += 1
    assert count == 59


@pytest.mark.parity
def test_no_variant_of_theirs_is_read_as_plain():
    """VeLoRA's is one in training alone: it stores less for the backward pass."""
    settings = dataclasses.fields(pytest.importorskip('peft').LoraConfig)
    variants = {field.name for field in settings if field.metadata.get('is_lora_variant')}
    assert variants and variants - {'velora_config'} <= set(peft._FIXED)


@pytest.mark.parity
def test_ours_in_theirs(tmp_path):
    stage, weights = model_of('paligemma')
    section = config.parse_stage({**config.to_dict(stage), 'lora': dict(rules=RULES)}, trained=False).lora
    params = trees.flat(lora.add(trees.nested(weights), section, jax.random.key(0)))
    rng = np.random.default_rng(0)
    adapters = {path: np.asarray(x) for path, x in params.items() if lora.is_adapter(path)}
    for path in [path for path in adapters if path.endswith(lora.B)]:
        adapters[path] = rng.normal(size=adapters[path].shape).astype(np.float32)
    peft.write(tmp_path / 'peft', adapters, stage)
    check_merged(stage, trees.flat(lora.merge(trees.nested(weights | adapters))), theirs(folder=tmp_path / 'peft'))


@pytest.mark.parity
def test_theirs_in_ours(tmp_path):
    stage, weights = model_of('paligemma')
    settings = dict(r=4, lora_alpha=16, target_modules='all-linear', init_lora_weights=False)
    settings |= dict(rank_pattern={'v_proj': 2}, alpha_pattern={'q_proj': 5})
    state = theirs(settings, tmp_path)
    found = peft.read(tmp_path, stage, weights)
    check_merged(stage, trees.flat(lora.merge(trees.nested(weights | found))), state)
