"""TPUs that are described, not present: libtpu compiles for them on any Linux machine."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, NamedTuple

from big_vlm.config import UserError, unknown

if TYPE_CHECKING:
    import jax

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBE = ('2x2x1', '2x2x2', '2x4x4', '4x4x4')
TOPOLOGIES = tuple(
    f'{family}:{shape}' for family, shapes in (('v5e', _FLAT), ('v6e', _FLAT), ('v5p', _CUBE)) for shape in shapes
)
# What the TPU compiler lets a program have on one chip, from its errors (libtpu 0.0.42.1); jax's `device_kind`.
HBM_GIB = {'TPU v5 lite': 15.75, 'TPU v5': 95.74, 'TPU v6 lite': 31.25}


class Chips(NamedTuple):
    """Described devices, and the bytes of memory that a program may use on each."""

    devices: list[jax.Device]
    memory: int


def describe(name: str) -> Chips:
    """The chips of an absent TPU, such as 'v5e:2x4'. To be called before jax has looked for devices of its own.

    Raises:
      UserError: a name that is not in TOPOLOGIES, or no libtpu that works with this jax.
    """
    if name not in TOPOLOGIES:
        raise unknown('topology', name, TOPOLOGIES)
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(
            f"{name}: the TPU compiler, libtpu, is not installed: pip install -e '.[tpu]' brings it (on Linux); or "
            'simulate devices on the CPU with --devices=N'
        )
    # libtpu would wait for the metadata server of a machine that it takes for a Cloud TPU's.
    os.environ |= {
        'JAX_PLATFORMS': 'cpu',
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # its lock keeps two processes off one TPU, and there is none
    }
    import jax
    from jax.experimental import topologies

    single = {'chips_per_host_bounds': [1, 1, 1]} if name.endswith(':1x1') else {}
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=name, **single).devices
    except RuntimeError as error:
        raise UserError(
            f'{name}: libtpu and jax {jax.__version__} do not work together ({str(error).splitlines()[0]}): '
            "pip install -e '.[tpu]' brings the libtpu of this jax"
        ) from error
    return Chips(devices, int(HBM_GIB[devices[0].device_kind] * 2**30))
