"""MedHMP's encoder of hours, forward and backward on the CPU, against the same layers over packed sequences.

Rival, same weights and stays:
    packed    PyTorch's packed sequences, which skip the hours that a stay does not have
Run: python benchmarks/hourly_encoder.py [--rounds 5] [--stays 256] [--hidden-size 256] [--features 1318]
"""

import argparse
import statistics
import time

import torch

from hf_ehr.models.configuration_medhmp import MedHMPConfig
from hf_ehr.models.hourly_series import HourlySeries
from hf_ehr.models.modeling_medhmp_stay import HourlyEncoder

ENTRIES = 80
"""Features of an hour that are not 0."""
WHOLE = 0.7
"""Stays of a batch that have every hour of the window; the others have from one hour to all."""


def series_of(stays: int, config: MedHMPConfig) -> HourlySeries:
    """Random stays."""
    generator = torch.Generator().manual_seed(1)
    hours = torch.randint(1, config.n_hours + 1, (stays,), generator=generator)
    hours[torch.rand(stays, generator=generator) < WHOLE] = config.n_hours
    values = torch.rand(stays, config.n_hours, config.num_hourly_features, generator=generator)
    return HourlySeries.of(config.num_hourly_features, hours, hourly_values=values < ENTRIES / values.shape[2])


def step(read, encoder: HourlyEncoder, series: HourlySeries) -> tuple[float, torch.Tensor]:
    """CPU seconds of one step, and its gradient."""
    encoder.zero_grad()
    started = time.process_time()
    states, cells = read(series)
    (states.square().sum() + cells.square().sum()).backward()
    seconds = time.process_time() - started
    return seconds, torch.cat([weight.grad.flatten() for weight in encoder.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stays", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--features", type=int, default=1318)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": arguments.hidden_size, "num_hourly_features": arguments.features}
    config = MedHMPConfig(hidden_dropout_prob=0.0, **sizes)
    encoder, series = HourlyEncoder(config), series_of(arguments.stays, config)
    forms = {"ours": encoder._padded, "packed": encoder._packed}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    gradients = {}
    for form in forms.values():  # kernels are chosen on the first step
        step(form, encoder, series)
    for _ in range(arguments.rounds):
        for name, form in forms.items():
            taken, gradients[name] = step(form, encoder, series)
            seconds[name].append(taken)
    off = float((gradients["ours"] - gradients["packed"]).norm() / gradients["packed"].norm())
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["packed"], strict=True)]
    there = float(series.mask.float().mean())
    print(
        f"{arguments.stays} stays of {arguments.features} features, width {arguments.hidden_size}, "
        f"{there:.0%} of the hours there: ours {statistics.median(seconds['ours']):.2f} s, "
        f"packed {statistics.median(seconds['packed']):.2f} s; {statistics.median(ratios):.2f} times as fast "
        f"[{min(ratios):.2f}, {max(ratios):.2f}]; gradient {off:.1e} apart"
    )


if __name__ == "__main__":
    main()
