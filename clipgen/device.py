"""Devices: which one to use, its default precision, and whether its memory ran out."""

from __future__ import annotations

import re

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` means out of memory; CPUs, CUDA captures and cuBLAS raise RuntimeErrors."""
    told = re.search("(?<!illegal )memory|ALLOC_FAILED", str(error))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or told is not None


def find_device(device: str | torch.device | None) -> torch.device:
    """The device with that name; None: CUDA if there is a CUDA device, else the CPU.

    ValueError: not the name of a device, or a CUDA device that does not exist.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        found = torch.device(device or ("cuda" if devices else "cpu"))
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= devices:
        raise ValueError(f"device {found} does not exist: PyTorch sees {devices} CUDA devices "
                         "here; use device cpu")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """The GPT's precision: fp32 on CPU; on CUDA bf16 from compute capability 8, fp16 below."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
