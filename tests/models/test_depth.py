"""The same model with another number of layers: for the trial in miniature, and for the estimate of memory."""

import torch
import transformers
from transformers import BartConfig, HrmTextConfig, ZambaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from amopo_fast.models.depth import depth_of, set_layers
from amopo_fast.models.miniature import miniature


def on_meta(config):
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def test_the_miniature_is_not_as_deep_as_the_layers_that_differ():
    """What no list of the configuration says: a layer of each make stays, or two where one does not build."""
    zamba = miniature(on_meta(ZambaConfig()))
    assert zamba.config.layers_block_type == ["linear_attention", "linear_attention", "hybrid", "hybrid"]
    loops = getattr(transformers, "Inkling2LoopTextConfig", None)
    if loops is not None:  # transformers >= 5.24
        tiny = miniature(on_meta(loops())).config
        assert tiny.layer_types == ["hybrid_sliding", "hybrid"] * 2
        assert (tiny.loop_layer_index_start, tiny.loop_layer_index_end, tiny.loop_num_passes) == (2, 4, 2)


def test_a_decoder_has_the_depth_that_its_layers_have():
    """An encoder's layers are counted beside BART's, and HRM counts those of all cycles."""
    for config in (BartConfig(encoder_layers=5, decoder_layers=7, is_decoder=True), HrmTextConfig()):
        model = on_meta(config)
        before = depth_of(config)
        set_layers(config, 3)
        shorter = on_meta(config)
        assert depth_of(config) == 3 and before == (7 if isinstance(config, BartConfig) else 16)

        def count(model):
            return sum(type(module).__name__.endswith("DecoderLayer") for module in model.modules())

        assert count(shorter) * before == count(model) * 3
