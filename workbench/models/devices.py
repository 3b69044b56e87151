"""Where and in which numbers a model computes, and how much memory is free there: all that knows about devices."""

from pathlib import Path

import psutil
import torch


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on; `"auto"` is CUDA, else MPS, else the CPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    there = {"cuda": cuda, "mps": mps}.get(picked.type, True)
    if not there or (picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {str(picked)!r} is not available here; use device='auto' or device='cpu'")
    return picked


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)


#: What a model can be computed in.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pick_dtype(
    dtype: str | torch.dtype, device: torch.device, checkpoint: str | torch.dtype | None = None
) -> torch.dtype:
    """Return the floating dtype to compute in; `"auto"` is float32 on the CPU and the checkpoint's own elsewhere.

    >>> pick_dtype("auto", torch.device("cpu"), torch.bfloat16)
    torch.float32
    >>> pick_dtype("auto", torch.device("cuda"), torch.bfloat16)
    torch.bfloat16
    """
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" or checkpoint is None else checkpoint
    picked = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if picked not in DTYPES:
        raise ValueError(
            f"{dtype!r} is no floating dtype to compute in; use 'auto', 'float32', 'bfloat16' or 'float16'"
        )
    return picked


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, or the CUDA device for it; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage on Linux also counts what ran in this process before
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        return None if line is None else int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
