"""Decoding block by block without a GPU: traced and guarded as there, with no compiler and nothing recorded."""

from functools import partial

from mmshiftkv.decode.block_step import BlockDecoding, BlockStep
from mmshiftkv.decode.fitting import obstacle_to_blocks
from mmshiftkv.decode.loop import decode_with


def eager_backend(graph_module, example_inputs):
    return graph_module


class ByBlocks:
    """Options of `generate` for one model; what is compiled stays for its next answers."""

    def __init__(self, model, backend=eager_backend):
        self.decoding = BlockDecoding(model.device, backend)
        self.options = {"custom_generate": partial(decode_with, self._step)}

    def _step(self, model, inputs, cache, generation_config, model_kwargs):
        obstacle = obstacle_to_blocks(model, cache, inputs)
        assert obstacle is None, obstacle
        return BlockStep(model, inputs, cache, self.decoding)
