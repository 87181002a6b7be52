"""What the GPU did while it was timed: clock, power, temperature and what held it back, through NVML where it is."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from harness.environment import package_version

EVERY_S = 0.02
REASONS = {  # bits of NVML's clocks event reasons; idle (1) and clocks that somebody set (2, 0x100) hold nothing back
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@contextmanager
def watch(device: str) -> Iterator[dict[str, Any]]:
    """Medians over the block, as columns of a record; nothing where there is no GPU or no NVML.

    sm_clock_mhz, power_w, temperature_c, and throttle: the reasons seen, with their share of the samples. NVML's power
    lags by about a second, so a block that is shorter than that has no meaningful power.
    """
    found: dict[str, Any] = {}
    handle = _handle() if device == "cuda" else None
    if handle is None:
        yield found
        return
    samples, done = [_look(handle)], threading.Event()

    def keep_looking() -> None:
        while not done.wait(EVERY_S):
            samples.append(_look(handle))

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    clock, power, temperature, reasons = zip(*samples, strict=True)
    found |= {"sm_clock_mhz": median(clock), "power_w": median(power), "temperature_c": median(temperature)}
    found["throttle"] = in_words(reasons)


def in_words(reasons: tuple[int, ...]) -> str:
    """`power cap 80 %`: every reason that some sample had, and how many of them."""
    shares = {word: sum(bool(bits & bit) for bits in reasons) / len(reasons) for bit, word in REASONS.items()}
    return ", ".join(f"{word} {100 * share:.0f} %" for word, share in shares.items() if share)


def _handle() -> Any:
    """NVML's handle of torch's current GPU, by its UUID: NVML numbers GPUs in its own way."""
    if package_version("nvidia-ml-py") is None:
        return None
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        _look(handle)  # a part of a GPU has a handle and may refuse every question
        return handle
    except pynvml.NVMLError:
        return None


def _look(handle: Any) -> tuple[float, float, float, int]:
    import pynvml

    return (
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
    )
