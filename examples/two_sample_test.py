"""Asks whether two samples come from one distribution, and where they differ: python examples/two_sample_test.py"""

from __future__ import annotations

import argparse

import torch

import fastvae


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500, help="rows of each sample")
    args = parser.parse_args()
    torch.manual_seed(0)

    reference = torch.randn(args.n, 5)
    same = torch.randn(args.n, 5)
    shifted = torch.randn(args.n, 5)
    shifted[: args.n // 4, 0] += 2.0  # a quarter of the rows moves along one axis

    found = {}
    for name, sample in (("same", same), ("shifted", shifted)):
        one = fastvae.two_sample_test(reference, sample, seed=0)  # one kernel with the median bandwidth
        fuse = fastvae.two_sample_test(reference, sample, aggregate="fuse", kernel=["rbf", "laplace"], seed=0)  # a set of kernels
        print(f"{name}: p = {one.p_value:.3f} with one kernel, {fuse.p_value:.3f} with MMD-FUSE")
        found[name] = one.p_value

    # The witness function is negative where the second sample is the denser one.
    t = torch.zeros(7, 5)
    t[:, 0] = torch.linspace(-3, 3, 7)
    for place, height in zip(t[:, 0].tolist(), fastvae.witness(t, reference, shifted, bandwidth="median").tolist(), strict=True):
        print(f"at {place:+.0f}: {height:+.4f}")
    return found


if __name__ == "__main__":
    main()
