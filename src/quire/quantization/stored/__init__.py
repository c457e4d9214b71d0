"""How checkpoints store dense layers in few bits, read from their config. No torch.

`STORED_FORMATS` is the table of formats by the name in `quantization_config.quant_method`. A row's function reads the
config into `StoredWeights`; `quire.models.stored` reads the tensors.
"""

from quire.quantization.stored.formats import FAMILY_FORMATS, STORED_FORMATS, read_stored_weights
from quire.quantization.stored.scheme import KeptBits, Rule, Scheme, StoredWeights

__all__ = ["FAMILY_FORMATS", "STORED_FORMATS", "KeptBits", "Rule", "Scheme", "StoredWeights", "read_stored_weights"]
