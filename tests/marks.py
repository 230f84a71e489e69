"""What this machine may lack."""

import pytest
import torch

INT8 = torch.cpu._is_vnni_supported()
NEEDS_INT8 = pytest.mark.skipif(not INT8, reason="needs a CPU with AVX-512 VNNI")
