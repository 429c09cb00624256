"""Self-distillation beside a contrastive loss: local views (SILC) and masked patches (TIPS), as SigLIP 2 adds them.

The teacher is a moving average of the image tower and of the heads. It sees an image's global view; the student sees
local views of the image, and the global view with half of its patches masked (arXiv 2502.14786, section 2.3).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from big_vlm import config
from big_vlm.data.contract import Contract
from big_vlm.models import image_towers, vit
from big_vlm.models.distillation_head import DistillationHead
from big_vlm.ops import chunks, distillation, pixels, position_resize
from big_vlm.ops.pair_logits import matmul

VIEWS = ('global_view', 'local_views')
_PATCHES = 16  # whose logits exist at once


class Distillation:
    """What the task adds for `model.distill`: parameters under 'distill', statistics under 'teacher', and its loss.

    Parameters: `local` and `masked`, a head each, and `mask`, which stands for a masked patch. The teacher: `img` and
    `distill` like the parameters of these names, `centre` of each head's logits, and `steps`, for how many it has
    followed the student. A teacher of no steps is the student, whatever weights that began with.

    Args:
      model: the validated section.
      contract: image size and value range.
      tower: the image tower.

    Raises:
      UserError: a tower other than a ViT of square images.
    """

    def __init__(self, model: config.Model, contract: Contract, tower: image_towers.ImageTower):
        if not isinstance(tower, vit.ViT):
            what = 'contract.max_patches' if contract.max_patches else f'model.image.variant={model.image.variant!r}'
            raise config.UserError(f'model.distill: it takes a transformer of square images, not {what}: leave it out')
        self.settings, self.contract, self.tower = model.distill, contract, tower
        self.dtype = jnp.dtype(model.dtype)
        s = self.settings
        self.heads = [name for name in ('local', 'masked') if getattr(s, name)]
        self.head = DistillationHead(s.hidden, s.bottleneck, s.prototypes, self.dtype)
        self.patches = tower.tokens(contract.image_size)
        self.masked = max(1, round(s.share * self.patches))

    @property
    def flops(self) -> float:
        """Model FLOPs of one example; those of local views, which the pipeline makes, are left out."""
        tower, head = self.tower.flops(self.contract.image_size), self.head.flops(self.tower.sizes['width'])
        masked = 3 * tower + 4 * head * self.masked if 'masked' in self.heads else 0.0
        return tower + masked  # the teacher's forward pass, and the student's, there and back

    def init(self, rng: jax.Array, img: dict) -> tuple[dict, dict]:
        """Fresh (parameters, teacher) for an image tower of the parameters `img`."""
        width = self.tower.sizes['width']
        keys = dict(zip(('local', 'masked', 'mask'), jax.random.split(rng, 3), strict=True))
        params = {name: self.head.init_params(keys[name], width) for name in self.heads}
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        teacher = {
            'steps': jnp.zeros((), jnp.int32),
            'img': zeros(img),
            'distill': zeros(params),
            'centre': {name: jnp.zeros(self.settings.prototypes) for name in self.heads},
        }
        if 'masked' in self.heads:
            params['mask'] = width**-0.5 * jax.random.normal(keys['mask'], (1, 1, width))
        return params, teacher

    def loss(
        self, params: dict, teacher: dict, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """(weighted loss, metrics, the next teacher).

        Args:
          params: `img` and `distill` of the task's.
          teacher: as `init` returns it. It takes a step towards the parameters first, which after an optimizer's step
            is DINO's order.
          batch: `global_view` uint8 [B,H,W,3] and `local_views` uint8 [B,n,h,w,3].
          rng: which patches are masked, and dropout.
        """
        missing = [name for name in VIEWS if name not in batch]
        if missing:
            raise config.UserError('model.distill: the pipeline makes no views: add views(8, 96) before resize')
        s = self.settings
        teacher = self.followed(teacher, params)
        whole = pixels.to_model_range(batch['global_view'], self.contract.value_range, self.dtype)
        pooled, encoded = jax.lax.stop_gradient(self._features(teacher['img'], whole))
        keys = jax.random.split(rng, 3)
        total, metrics, centre = 0.0, {}, {}
        if 'local' in self.heads:
            student = self._local(params['img'], batch['local_views'], keys[0])
            loss, centre['local'] = self._compared('local', params, teacher, student, pooled[:, None])
            total, metrics['local_loss'] = total + s.local * loss, loss
        if 'masked' in self.heads:
            _, chosen = jax.lax.top_k(jax.random.uniform(keys[1], encoded.shape[:2]), self.masked)
            masked = jnp.any(chosen[..., None] == jnp.arange(self.patches), axis=1)
            token = params['distill']['mask']
            _, student = self._features(params['img'], whole, keys[2], masked=masked, mask_token=token)
            student, target = (jnp.take_along_axis(x, chosen[..., None], axis=1) for x in (student, encoded))
            loss, centre['masked'] = self._compared('masked', params, teacher, student, target)
            total, metrics['masked_loss'] = total + s.masked * loss, loss
        return total, metrics, teacher | {'centre': centre}

    def followed(self, teacher: dict, params: dict) -> dict:
        """The teacher a step later: decay · teacher + (1 − decay) · parameters; without gradients."""
        first, decay = teacher['steps'] == 0, self.settings.decay

        def follow(old, new):
            return jnp.where(first, new, decay * old + (1 - decay) * new)

        student = jax.lax.stop_gradient(
            {'img': params['img'], 'distill': {k: params['distill'][k] for k in self.heads}}
        )
        moved = jax.tree.map(follow, {name: teacher[name] for name in student}, student)
        return teacher | moved | {'steps': teacher['steps'] + 1}

    def _features(self, img, images, rng=None, **masking):
        """(pooled [B,D], every patch's [B,P,D])."""
        rngs = None if rng is None else {'dropout': rng}
        _, out = self.tower.apply({'params': img}, images, train=rng is not None, rngs=rngs, **masking)
        return out['pooled'], out['encoded']

    def _local(self, img, views, rng):
        """Pooled features of the local views, [B,n,D]."""
        side, patch = views.shape[2], self.tower.sizes['patch_size']
        if side % patch:
            raise config.UserError(f'views(…, {side}): local views must be whole patches of {patch} pixels')
        if 'pos_embedding' in img:
            grid = side // patch, side // patch
            img = img | {'pos_embedding': position_resize.antialiased(img['pos_embedding'], grid)}
        images = pixels.to_model_range(views, self.contract.value_range, self.dtype)
        pooled, _ = self._features(img, images.reshape(-1, *images.shape[2:]), rng)
        return pooled.reshape(*views.shape[:2], -1)

    def _compared(self, name, params, teacher, student, target):
        """(loss, the head's next centre) of features [B,n,D] of the student, and of the teacher [B,n,D] or [B,1,D]."""
        s, centre = self.settings, teacher['centre'][name]
        student, prototypes = self.head.apply({'params': params['distill'][name]}, student)
        target, of_teacher = jax.lax.stop_gradient(self.head.apply({'params': teacher['distill'][name]}, target))
        # The mean of the logits, of which there are too many to exist, is the logits of the mean.
        mean = matmul('KD,D->K', of_teacher, jnp.mean(target, axis=(0, 1)))
        target = jnp.broadcast_to(target, student.shape)

        def compare(student, target):
            logits = matmul('...D,KD->...K', student, prototypes), matmul('...D,KD->...K', target, of_teacher)
            return distillation.cross_entropy(*logits, centre, s.temperature, s.teacher_temperature)

        loss = jnp.mean(chunks.over_positions(compare, _PATCHES, student, target))
        return loss, s.centre_decay * centre + (1 - s.centre_decay) * mean
