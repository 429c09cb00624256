"""Saving and restoring: whole training states, and weights by name. The only package that knows Orbax."""

from big_vlm.checkpoints.checkpointer import Checkpointer as Checkpointer
from big_vlm.checkpoints.checkpointer import abstract as abstract
from big_vlm.checkpoints.weights import load_weights as load_weights
from big_vlm.checkpoints.weights import save_weights as save_weights
from big_vlm.checkpoints.weights import weight_shapes as weight_shapes
