"""Weights from and to other libraries, a file for each."""

from fastlstm.interchange.torch import from_torch_state_dict, to_torch_state_dict

__all__ = ["from_torch_state_dict", "to_torch_state_dict"]
