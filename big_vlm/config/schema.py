"""The schema of a run: one dataclass per section, every field with its meaning, unit and default.

A config file's `get_config(arg)` returns a `ConfigDict` (or a dict) with these keys: one `Stage`, or several of them
named by `stages`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

# A number's annotation carries the least value it may take.
Positive = Annotated[int, 1]
Count = Annotated[int, 0]
Amount = Annotated[float, 0.0]
# The last ones are policies of jax.checkpoint_policies: 'dots_saveable' keeps what matrix products made, and
# 'dots_with_no_batch_dims_saveable' of these what has no batch of matrices, so all but attention's own.
Remat = Literal['none', 'full', 'nothing_saveable', 'dots_saveable', 'dots_with_no_batch_dims_saveable']


@dataclass(frozen=True)
class Duration:
    """A length of training in one unit; giving two is an error. All zero: none."""

    steps: Count = 0  # global batches
    examples: Count = 0  # training examples seen
    epochs: Amount = 0.0  # passes over the stage's training examples
    percent: Amount = 0.0  # of the stage's total steps (not for `total` itself)

    def given(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]


@dataclass(frozen=True)
class Mesh:
    """Devices per axis; data may be -1, the rest of them."""

    data: int = -1  # batch shards with a full copy of the weights
    fsdp: int = 1  # batch shards among which each weight is split
    model: int = 1  # split inside layers (heads, mlp, vocabulary)
    # (regex over the whole path, an axis or None for each of the last dimensions): the first match goes before the
    # rules of sharding/rules.py, and what it leaves whole may be split along fsdp by its size.
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()


@dataclass(frozen=True)
class Contract:
    """How pixels and text become arrays; it travels with the weights."""

    image_size: Positive = 224  # pixels, square
    max_patches: Count = 0  # NaFlex: of a picture at its own aspect ratio, instead of image_size; 0: squares
    resample: Literal['bilinear', 'bicubic'] = 'bilinear'  # what `resize` uses
    antialias: bool = True  # low-pass before shrinking (PIL); False is big_vision's plain resize
    value_range: tuple[float, float] = (-1.0, 1.0)  # what 0 and 255 map to
    text_length: Positive = 64  # contrastive: text tokens; generative: text slots after the image slots
    lower: bool = True  # lower-case the text
    eos: bool = True  # contrastive text ends in eos, kept when the text is cut
    separator: str = '\n'  # between prompt and answer, tokenized on its own
    image_alone: bool = False  # image tokens see no prompt (PaliGemma's do): rows of several prompts may share an image
    causal_prompt: bool = False  # a prompt's token sees those before it, an image all of itself (Gemma 3, text alone)
    images: Positive = 1  # generative: that an example may have, or frames of a video; fewer leave slots of padding


@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model."""

    path: str = ''  # '': train one from the training text of the stages
    vocab_size: Positive = 384  # pieces of a trained one, before the location and segmentation tokens


@dataclass(frozen=True)
class ImageTower:
    """A vision transformer, or a ResNet. A size of 0 is the variant's own."""

    variant: str = 'B/16'  # name/patch size; or R50, R101x3: BiT's ResNets, which have width, pool, norm and head_bias
    width: Count = 0  # a ResNet's: channels of its first bottlenecks
    depth: Count = 0
    mlp_dim: Count = 0
    num_heads: Count = 0
    # Attention head, mean, class or first token, all; what a decoder sees is its projector's choice.
    pool: Literal['map', 'gap', 'tok', 'first', 'none'] = 'map'
    head_bias: bool = True  # of the projection to the joint width, or to a decoder's
    norm: Literal['group', 'batch'] = 'group'  # a ResNet's; 'batch' depends on the batch in training
    stem: Literal['patch', 'conv'] = 'patch'  # a token is one product of its patch, or what convolutions leave of it
    position: Literal['learn', 'sincos2d'] = 'learn'  # position embedding
    position_init: Amount = 0.0  # stddev of the learned position embedding's init; 0: 1/sqrt(width)
    dropout: Amount = 0.0
    patch_dropout: Amount = 0.0  # share of an image's patches that training leaves out, others each time (FLIP)


@dataclass(frozen=True)
class TextTower:
    """The dual encoder's text tower. A size of 0 is the variant's own."""

    kind: Literal['transformer', 'lstm', 'bag', 'gemma'] = 'transformer'  # 'gemma': of the sizes in model.decoder
    variant: str = 'B'
    width: Count = 0
    depth: Count = 0
    mlp_dim: Count = 0
    num_heads: Count = 0
    pool: Literal['last', 'first', 'mean', 'max', 'map', 'tok'] = 'last'  # over positions; 'last' is SigLIP's
    mask: bool = False  # attend to and pool real tokens only; SigLIP attends to padding
    causal: bool = False  # a token sees those before it alone; CLIP and language models
    embed_init: Amount = 0.0  # stddev of the token embedding's init; 0: 1/sqrt(width)
    dropout: Amount = 0.0


@dataclass(frozen=True)
class Decoder:
    """The Gemma decoder. A size of 0 is the variant's own."""

    variant: str = 'gemma_2b'  # or gemma_7b, gemma2_2b … _9b, _27b, gemma3_270m … _1b, _4b, _12b, _27b
    width: Count = 0
    depth: Count = 0
    mlp_dim: Count = 0
    num_heads: Count = 0
    num_kv_heads: Count = 0
    head_dim: Count = 0
    window: Count = 0  # tokens that a local layer sees (Gemma 2 and 3)
    attn_softcap: Amount | None = None  # tanh cap of the attention logits; 0: none; None: the variant's (Gemma 2: 50)
    final_softcap: Amount = 0.0  # tanh cap of the output logits; 0: none (Gemma 2: 30)
    dropout: Amount = 0.0


@dataclass(frozen=True)
class Captioner:
    """A decoder beside a dual encoder that writes captions and boxes from the image tokens, to train the image tower.

    Its other sizes are the text tower's. Captions are the batch's texts; boxes come with `ground()` in the pipeline.
    """

    weight: Amount = 0.0  # of its loss, which is added to the contrastive one; 0: there is no decoder (SigLIP 2: 1)
    depth: Count = 0  # 0: half the text tower's
    parallel: Amount = 0.5  # share of captions of which all tokens are predicted at once


@dataclass(frozen=True)
class Distillation:
    """The image tower learns what its own moving average, the teacher, makes of an image of which it sees less.

    Views of the images come with `views(…)` in the pipeline.
    """

    local: Amount = 0.0  # weight of the loss of local views (SILC); 0: none (SigLIP 2: 0.25 for B, 1 for So400m)
    masked: Amount = 0.0  # weight of the loss at masked patches (TIPS); 0: none (SigLIP 2: a quarter of local)
    share: Amount = 0.5  # of the patches, that are masked
    decay: Amount = 0.996  # of the teacher, per step
    hidden: Positive = 2048  # width of the heads
    bottleneck: Positive = 256  # dimensions in which features are compared with prototypes
    prototypes: Positive = 65536  # over which student and teacher distribute an image, or a patch
    temperature: Amount = 0.1  # of the student's distribution
    teacher_temperature: Amount = 0.04  # lower: a sharper teacher
    centre_decay: Amount = 0.9  # of the mean of the teacher's logits, per step


@dataclass(frozen=True)
class Masks:
    """The mask VQ-VAE's codebook, whose rows follow the vectors that they stand for."""

    commitment: Amount = 0.25  # weight of the vectors' distance from their rows
    decay: Amount = 0.99  # of the moving averages, per step
    revive: Amount = 0.05  # a row with less than this share of its part of the vectors becomes one of them; 0: never


@dataclass(frozen=True)
class Model:
    """The network and its loss."""

    image: ImageTower = ImageTower()
    text: TextTower = TextTower()  # contrastive
    decoder: Decoder = Decoder()  # generative, and text towers of kind 'gemma'
    # Generative, what the decoder sees of an image: every patch, averages (Gemma 3), one token; 'none': there is none.
    projector: Literal['linear', 'pooled', 'cls', 'none'] = 'linear'
    image_tokens: Count = 0  # generative: to which 'pooled' averages the patches of an image, a square; 0: 256
    embed_dim: Count = 0  # contrastive: joint embedding width; 0: the image tower's
    init_t: float = math.log(10.0)  # contrastive: log of the logit scale at init; CLIP's is log(1 / 0.07)
    max_logit_scale: Amount = 0.0  # contrastive: the logit scale is held at or below it (CLIP: 100); 0: it is free
    init_b: float = -10.0  # contrastive: logit bias at init; the softmax loss has none and leaves it there
    loss: str = 'sigmoid'  # contrastive: 'sigmoid' (SigLIP) or 'softmax' (CLIP)
    direction: Literal['both', 'image_to_text', 'text_to_image'] = 'both'  # softmax: which has to find the other
    # Contrastive: the whole matrix of pairs, a tile of it at a time, or tiles while the texts travel from device to
    # device, the same to rounding; 'auto': the whole where it takes at most 16 MiB of a device, else a ring.
    loss_form: Literal['auto', 'dense', 'checkpoint', 'ring'] = 'auto'
    captioner: Captioner = Captioner()  # contrastive
    distill: Distillation = Distillation()  # contrastive
    masks: Masks = Masks()  # mask_autoencoder
    average: Literal['example', 'token'] = 'example'  # generative loss: mean per example then batch, or over all tokens
    # Generative: all logits at once, or of a chunk of supervised tokens at a time, the same to rounding; 'auto': all
    # where they take at most 256 MiB of a device.
    token_loss: Literal['auto', 'dense', 'gathered'] = 'auto'
    token_chunk: Positive = 256  # generative: supervised tokens of a device whose logits then exist at once
    label_smoothing: Amount = 0.0  # generative: share of an answer token's probability spread over all others
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matmuls; parameters are float32
    remat: Remat = 'none'  # what of each layer the backward pass computes again: 'full': all but its input
    scan: bool = True  # one compiled block for all layers


@dataclass(frozen=True)
class Source:
    """One source of the training mixture."""

    dataset: str = 'digit_scenes/cells'  # TFDS name, FILE.jsonl, folder:DIR, tar:FILES or hf:DIR
    split: str = 'train'
    weight: Amount = 1.0  # relative rate in the mixture
    where: dict[str, Any] = field(default_factory=dict)  # only records whose fields have these values (or one of them)
    pipeline: str = ''  # 'decode | resize(48) | ...'


@dataclass(frozen=True)
class Data:
    """Training data and how it is read."""

    sources: dict[str, Source] = field(default_factory=dict)
    data_dir: str = ''  # prepared datasets and .jsonl files; '': ~/.cache/big_vlm, and where the program runs
    workers: Count = 0  # processes; 0: threads of this one
    threads: Positive = 2  # decoding threads
    prefetch: Positive = 2  # batches made ahead


@dataclass(frozen=True)
class Pack:
    """Several examples in each row of a generative training batch, to leave less padding. Evaluation packs nothing."""

    examples: Positive = 1  # of a row, each with its own image; 1: none are packed
    text_length: Count = 0  # text slots that they share; what is too long for them is cut, and counted
    window: Positive = 32  # rows that are filled together; a process that loads fewer reads the examples of all


@dataclass(frozen=True)
class ParamRule:
    """What the optimizer does otherwise with the parameters that a regex matches."""

    lr: Amount = 1.0  # multiplies the learning rate
    decay: Amount | None = None  # multiplies the weight decay; None: 1 for weights, 0 for biases, norms, positions
    frozen: bool = False  # never updated, and no optimizer memory
    start: Duration = Duration()  # frozen until then; moments, warmup and schedule begin there
    layer_decay: Amount = 1.0  # each layer's rate is that of the layer above times this; embeddings' are the lowest
    warmup: Duration = Duration()  # none: the optimizer's
    schedule: Literal['', 'cosine', 'linear', 'constant', 'rsqrt'] = ''  # '': the optimizer's


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, its schedule, and exceptions by parameter."""

    name: str = 'adamw'  # or adafactor, big_vision_adafactor, lion, muon, sgd; see training/update_rules.py
    lr: Amount = 1e-3  # peak
    b1: Amount = 0.9  # decay of the first moment (adafactor keeps none; muon: usually 0.95; sgd: its momentum, or 0)
    # Decay of the second moment (adafactor: its cap; lion: of its one moment; sgd has none). None: 0.99, but
    # adafactor's has no cap, and big_vision's is 0.999.
    b2: Amount | None = None
    eps: Amount = 1e-8  # adamw, muon
    momentum_dtype: Literal['', 'float32', 'bfloat16'] = ''  # of the first moment; '': float32, big_vision's: bfloat16
    nesterov: bool = False  # sgd
    weight_decay: Amount = 0.0  # per step, times the learning rate
    decay_by: Literal['lr', 'schedule'] = 'lr'  # 'schedule': times lr's share of its peak alone (big_vision)
    offload: bool = False  # its arrays wait in the host's memory between steps; the same update, copies beside each
    clip: Amount = 1.0  # global gradient norm; 0: no clipping
    schedule: Literal['cosine', 'linear', 'constant', 'rsqrt'] = 'cosine'  # after the warmup, down to 0
    curve: tuple[float, float] = (0.0, 1.0)  # the part of a cosine or a line that the stage runs through
    warmup: Duration = Duration()  # linear, from 0
    cooldown: Duration = Duration()  # linear, to 0 at the end; of 'constant' and 'rsqrt'
    timescale: Duration = Duration()  # of rsqrt, 1 / sqrt(1 + (step - warmup) / timescale); none: the warmup
    rules: tuple[tuple[str, ParamRule], ...] = ()  # (regex over the whole path, dict); the first match wins
    ema_decay: Amount = 0.0  # moving average of the parameters that are trained, per step; 0: none is kept
    ema_warmup: bool = False  # the decay of step t is at most (1 + t) / (10 + t), so that the start is soon forgotten
    ema_use: Literal['average', 'last'] = 'average'  # what is evaluated and bundled; 'last' keeps it in checkpoints


@dataclass(frozen=True)
class LoraRule:
    """The adapters of the matrices that a regex matches."""

    rank: Positive = 16  # inner width
    alpha: Amount = 16.0  # what is added is alpha / rank times the product


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of frozen matrices (LoRA): they alone are trained, and the bundle holds their sum."""

    rules: tuple[tuple[str, LoraRule], ...] = ()  # (regex over the whole path, dict); first match wins; none: no LoRA
    train: tuple[str, ...] = ()  # regexes of other parameters to train, such as a new head
    # Of frozen matrices; beside 'int8' and 'int4', token tables are bfloat16.
    base_dtype: Literal['float32', 'bfloat16', 'int8', 'int4'] = 'float32'


@dataclass(frozen=True)
class Checkpoint:
    """When the whole state is saved, and what stays. The end of a stage always is saved."""

    every: Positive = 500  # steps
    keep: Positive = 2  # newest checkpoints kept; where the last one is found damaged, the one before is used
    keep_every: Count = 0  # steps; checkpoints of its multiples are kept too; 0: none
    best: str = ''  # 'EVAL/METRIC': saved whenever that is evaluated, and the best one is kept too; '': none
    best_is: Literal['max', 'min'] = 'max'  # 'min' where less is better, as of an error or perplexity
    grace: Count = 3  # failed saves in a row (a full disk, a quota, a lost mount) that a run survives


@dataclass(frozen=True)
class Guards:
    """What a run does about its own mishaps."""

    bad_steps: Count = 10  # a loss or gradient that is not finite updates nothing; so many in a row end the run; 0: one
    spike: Amount = 10.0  # a loss so many deviations (1.4826 MAD) above the median of the last 100 is told; 0: none is
    spike_steps: Count = 0  # so many spikes in a row are no better than bad steps; at most 50; 0: they are only told
    rollbacks: Count = 0  # so often, what would end the run sends it back to the checkpoint before, with later data
    watchdog_minutes: Amount = 15.0  # without a step's end, until it is said where every thread is; 0: never


@dataclass(frozen=True)
class Eval:
    """One evaluation."""

    kind: Literal['zero_shot', 'retrieval', 'linear_probe', 'generation', 'calibration', 'perplexity', 'reconstruction']
    dataset: str = 'digit_scenes/cells'
    split: str = 'validation'
    pipeline: str = ''
    where: dict[str, Any] = field(default_factory=dict)  # as a source's
    examples: Count = 0  # the first so many; 0: all
    batch_size: Count = 0  # 0: the stage's
    every: Count = 0  # steps; 0: at the end only
    # Record field of the class (zero_shot, linear_probe), of the text or column of texts (retrieval).
    label: str = 'label'
    classes: tuple[str, ...] = ()  # zero_shot: the class names
    templates: tuple[str, ...] = ('{}',)  # zero_shot: prompts, '{}' is the class name
    metrics: tuple[str, ...] = ('exact_match',)  # generation: names in evaluators/answer_metrics.py
    answers: str = ''  # generation: field or column (captions/text) of one or several true answers; '': the suffix
    max_new_tokens: Positive = 32  # generation, calibration
    choices: tuple[str, ...] = ()  # generation, calibration: the answers that may be given; with a grammar: the labels
    choices_field: str = ''  # the same, as the record field that lists those of each example
    grammar: Literal['', 'boxes'] = ''  # generation: 'boxes' are objects in location tokens, and nothing else
    codes: str = ''  # generation: .npz of the mask VQ-VAE by which mask_iou reads answers, as `segment` writes them
    fit_split: str = ''  # calibration, linear_probe: where they are fitted; required, other examples than `split`
    shots: Positive = 10  # linear_probe: the first so many of each class in `fit_split` are learnt
    slices: tuple[
        str, ...
    ] = ()  # zero_shot, linear_probe, generation, perplexity: fields scored by value, as 'held_out'


@dataclass(frozen=True)
class Weights:
    """Where weights come from. Neither stage nor path: nowhere."""

    stage: str = ''  # an earlier stage of this run
    path: str = ''  # a bundle, a checkpoint, FILE.npz[:SUBTREE], FILE.gguf or a Hugging Face folder
    parts: dict[str, str] = field(default_factory=dict)  # our subtree: theirs; '' is the whole tree; {}: everything
    fresh: tuple[str, ...] = ()  # regexes of parameters that stay as initialised, such as a new head
    resize_position: bool = True  # resize learned position embeddings to our resolution
    resize_method: Literal['bilinear', 'bicubic', 'antialiased'] = 'bilinear'  # big_vision's, Hugging Face's, NaFlex's


@dataclass(frozen=True)
class InitFrom(Weights):
    """Where the first weights come from. Nothing given: random."""

    state: bool = False  # all of the stage's state: optimizer and averages too, only step and schedule begin anew
    # Others besides, as a decoder's to an image tower; the later goes before the earlier.
    also: tuple[Weights, ...] = ()

    def given(self) -> dict[str, Weights]:
        """Key below the stage → what is given there, in the order in which it is taken."""
        every = {'init_from': self, **{f'init_from.also[{i}]': weights for i, weights in enumerate(self.also)}}
        return {key: weights for key, weights in every.items() if weights.stage or weights.path}


@dataclass(frozen=True)
class Stage:
    """One training stage, complete in itself."""

    task: Literal['contrastive', 'generative', 'mask_autoencoder']
    total: Duration = Duration()  # how long; required
    batch_size: Positive = 64  # global, examples
    accumulate: Positive = 1  # micro-batches of a step: less memory, the same update to rounding
    seed: Count = 0  # of the init, the data order and dropout
    mesh: Mesh = Mesh()
    contract: Contract = Contract()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    data: Data = field(default_factory=Data)
    pack: Pack = Pack()
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    checkpoint: Checkpoint = Checkpoint()
    guards: Guards = Guards()
    log_every: Positive = 50  # steps
    profile: tuple[int, int] = (0, 0)  # first and last step of a trace in WORKDIR/STAGE/profile; (0, 0): none
    wandb: str = ''  # project on Weights & Biases that the metrics go to as well; '': none
    evals: dict[str, Eval] = field(default_factory=dict)
    init_from: InitFrom = field(default_factory=InitFrom)

    @property
    def rows(self) -> int:
        """Of a global batch."""
        return self.batch_size // self.pack.examples
