"""One run in which images grow: a stage for every size, each going on with the state of the one before.

Small images cost less, and most of what there is to learn can be seen in them ("Fixing the train-test resolution
discrepancy", arXiv 1906.06423; "EfficientNetV2", arXiv 2104.00298, section 4). Every stage has its own compiled step,
data pipeline, folder, scores and bundle; weights, optimizer moments and averages are carried on, position embeddings
resized, and the learning rate runs through one curve.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict


def stages(make: Callable[[int], ConfigDict], sizes: Mapping[int, float]) -> dict[str, ConfigDict]:
    """The stages 'at_SIZE' by name, in order. The config of such a run:

        made = progressive.stages(my_stage, {128: 60, 192: 30, 224: 10})
        return ConfigDict(dict(stages=tuple(made), **made))

    Args:
      make: size in pixels → the stage as if all of the run were at this size: its total, warmup and schedule, a cosine
        or a line, are those of the whole run. Of its `init_from`, later stages keep the `resize_method` alone.
      sizes: size → its share of the run in percent, in order; together 100.

    Raises:
      ValueError: shares that are not 100 together, another schedule, a warmup (also that of the averages) whose part of
        the total is not known, one that is longer than the first share, rules with a start or warmup of their own.
    """
    if round(sum(sizes.values()), 6) != 100 or min(sizes.values()) <= 0:
        raise ValueError(f'sizes={dict(sizes)}: shares in percent must be positive and 100 together')
    made, done, before = {}, 0.0, None
    for number, (size, share) in enumerate(sizes.items()):
        stage = make(size)
        (unit, total), optimizer = _given(stage.total), stage.optimizer
        whole = unit, total, stage.get('batch_size', 64)
        warmup = _percent(optimizer.get('warmup', {}), *whole)
        if optimizer.get('schedule', 'cosine') not in ('cosine', 'linear'):
            raise ValueError(f"schedule='{optimizer.schedule}': only a cosine or a line can be run through in parts")
        _check_rules(optimizer)
        for name, percent in (('', warmup), ('of averages ', _percent(_average_warmup(optimizer), *whole))):
            if percent >= next(iter(sizes.values())):
                raise ValueError(f'a warmup {name}of {percent:g} % does not end within the first stage')

        def progress(percent: float, warmup: float = warmup) -> float:
            return max(percent - warmup, 0) / (100 - warmup)

        # Ends are rounded, so that the stages together are as long as the run.
        start, end = (total * percent / 100 for percent in (done, done + share))
        length = end - start if unit == 'epochs' else round(end) - round(start)
        stage.total = {unit: length}
        optimizer.curve = (progress(done), progress(done + share))
        optimizer.warmup = dict(percent=0.0 if before else 100 * warmup / share)
        if before:
            method = {key: how for key, how in stage.get('init_from', {}).items() if key == 'resize_method'}
            stage.init_from = dict(stage=before, state=True, **method)
            optimizer.ema_warmup = False  # it has ended
            stage.seed = stage.get('seed', 0) + number  # or it would see the first examples again, in their order
        before, done = f'at_{size}', done + share
        made[before] = stage
    return made


def _check_rules(optimizer: Mapping) -> None:
    """Raises ValueError for what every stage would begin anew."""
    for pattern, rule in optimizer.get('rules', ()):
        again = [name for name in ('start', 'warmup') if any(rule.get(name, {}).values())]
        again += ["schedule='rsqrt'"] if rule.get('schedule') == 'rsqrt' else []
        if again:
            raise ValueError(f"a rule's {again[0]} would come again in every stage, leave it out: {pattern}")


def _average_warmup(optimizer: Mapping) -> dict[str, float]:
    """Steps until the averages' decay is the whole one: (1 + t) / (10 + t) = decay."""
    decay = optimizer.get('ema_decay', 0.0)
    return dict(steps=(10 * decay - 1) / (1 - decay)) if optimizer.get('ema_warmup') and decay > 0.1 else {}


def _given(duration: Mapping[str, float]) -> tuple[str, float]:
    """The unit of a duration, and how many."""
    ((unit, amount),) = [(unit, amount) for unit, amount in duration.items() if amount]
    return unit, amount


def _percent(duration: Mapping[str, float], unit: str, total: float, batch_size: int) -> float:
    """Of the run."""
    if not any(duration.values()):
        return 0.0
    its, amount = _given(duration)
    if {its, unit} == {'steps', 'examples'}:
        its, amount = unit, amount * batch_size if its == 'steps' else amount / batch_size
    if its not in ('percent', unit):
        raise ValueError(f'a warmup in {its} of a run in {unit}: give both alike, or it in percent')
    return amount if its == 'percent' else 100 * amount / total
