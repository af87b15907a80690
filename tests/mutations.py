"""Deliberate faults in the kernels and the CPU path, each of which has to turn a test red: `python -m tests.mutations [NAME ...]`.

Each fault is put into a copy of the repository, in which the tests named beside it run. The table says what became of each; the exit status
is 1 if a fault survives, or if the text that it replaces is no longer found exactly once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Fault:
    """`old` in `path` becomes `new`; `tests` are the arguments of pytest that have to fail."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


HVP_CPU = ("tests/test_kernel_hvp.py", "-k", "on_a_cpu or several_tiles")
NEAR_ROWS = ("tests/test_hostile.py::test_near_rows",)
MMD_CPU = ("tests/test_mmd.py", "-k", "test_cpu")
MMD_TRITON = ("tests/test_mmd.py", "-k", "test_triton and (unbiased or tile or weights or wide or narrow) and not float64 and not half")

FAULTS = [
    Fault(
        "Triton: Riesz kernels of several bandwidths add up as energy kernels do",
        "kernels/families.py",
        "            ratio = tl.exp2(values[2 * KERNELS] * tl.log2(ratio))\n",
        "            ratio = ratio * 1.0\n",
        ("tests/test_mmd.py", "-k", "test_triton and Riesz and set"),
    ),
    Fault(
        "CPU: 1 − φ of Matérn 5/2 by its formula where it loses digits",
        "fastvae/cpu/families.py",
        "        torch.where(is_near, series, out.sub_(1), out=out)\n",
        "        out.sub_(1)\n",
        ("tests/test_mmd.py", "-k", "matern_of_a_wide"),
    ),
    Fault(
        "Triton: the slope of Matérn 3/2 has the factor of the RBF kernel",
        "kernels/families.py",
        "neg_dphi_factor=kernel.steepness, ",
        "",
        ("tests/test_mmd.py", "-k", "test_triton and Matern32"),
    ),
    Fault(
        "Triton: every problem of a batch reads the columns of the first",
        "kernels/mmd.py",
        "        operands = from_row(operands, problem * operands.rows, halves * D)\n",
        "",
        ("tests/test_mmd.py", "-k", "one_launch and rbf"),
    ),
    Fault(
        "Triton, few rows: a pair of a row with itself counts in the unbiased estimator",
        "kernels/few_rows.py",
        "            counted = counted & (offs_m[:, None] != offs_n[None, :])\n",
        "            counted = counted & mask_n[None, :]\n",
        ("tests/test_few_rows.py", "-k", "test_kernels and unbiased and rbf"),
    ),
    Fault(
        "Triton, few rows: the gradient is that of the last columns alone",
        "kernels/few_rows.py",
        "                if start_m > 0:\n",
        "                if start_m > n + m:\n",
        ("tests/test_few_rows.py", "-k", "test_shapes"),
    ),
    Fault(
        "group_mmd of a process group: pairs of two ranks count twice",
        "fastvae/ops/quadratic_form.py",
        "form(z, v, *options, False) + 0.5 * (across + across.T)",
        "form(z, v, *options, False) + across + across.T",
        ("tests/test_distributed.py", "-k", "test_on_ranks and 2"),
    ),
    Fault(
        "KSD on a CPU: a row's pair with itself in the sums of φ",
        "fastvae/cpu/ksd_to_normal.py",
        "                for t in (pairs.value, pairs.phi, pairs.slope):\n",
        "                for t in (pairs.value, pairs.slope):\n",
        ("tests/test_ksd_to_normal.py", "-k", "several_tiles"),
    ),
    Fault(
        "KSD on a CPU: sums of φ over columns are not added to the rows of these",
        "fastvae/cpu/ksd_to_normal.py",
        "                phi_sums[j].add_(pairs.phi.sum(0), alpha=c.weight)\n",
        "                pass\n",
        ("tests/test_ksd_to_normal.py", "-k", "several_tiles"),
    ),
    Fault(
        "KSD on a CPU: a coefficient of x·y is rounded",
        "fastvae/cpu/ksd_to_normal.py",
        "            half_d2 = float(np.float32(half_d2 + more[0])) - more[0]\n",
        "            pass\n",
        ("tests/test_ksd_to_normal.py", "-k", "rounding_of_coefficients"),
    ),
    Fault(
        "KSD on a CPU: the Hessian takes x·a for that of the rows as they are moved",
        "fastvae/cpu/ksd_to_normal.py",
        "        dots = torch.linalg.vecdot(z.double(), direction.double())\n        weighted",
        "        dots = torch.linalg.vecdot(centred.double(), direction.double())\n        weighted",
        ("tests/test_ksd_to_normal.py", "-k", "second_derivative_of_several_tiles"),
    ),
    Fault(
        "KSD on a CPU: sums of φ' over columns are not added to the rows of these in the Hessian",
        "fastvae/cpu/ksd_to_normal.py",
        "                    (a.phi_sums, a.cross_sums)[total][j].add_(tile.sum(0), alpha=factor)\n",
        "                    a.phi_sums[j].add_(tile.sum(0), alpha=factor * (total == 0))\n",
        ("tests/test_ksd_to_normal.py", "-k", "second_derivative_of_several_tiles"),
    ),
    Fault(
        "KSD: a third derivative counts as zero",
        "fastvae/ops/ksd_to_normal.py",
        '    rows = forbid_third_derivative("ksd_to_normal", z)\n',
        "    rows = z\n",
        ("tests/test_ksd_to_normal.py", "-k", "third"),
    ),
    Fault(
        "KSD in Triton: the Hessian takes s with the other sign in x·a_y + a_x·y",
        "kernels/ksd_to_normal.py",
        "    of_rows = 2.0 * neg_s + ",
        "    of_rows = -2.0 * neg_s + ",
        ("tests/test_ksd_to_normal.py", "-k", "second_derivative_in_float64 and triton"),
    ),
    Fault(
        "KSD in Triton: padded columns count",
        "kernels/ksd_to_normal.py",
        "(offs_n[:, None] != offs_m[None, :]) & (offs_m < n)[None, :]",
        "offs_n[:, None] != offs_m[None, :]",
        ("tests/test_ksd_to_normal.py", "-k", "float64 and triton"),
    ),
    Fault(
        "KSD in Triton: the gradient of x·y at rows that are moved",
        "kernels/ksd_to_normal.py",
        "slope[:, None] * rounded) + of_row[:, None] * z.to(dtype)",
        "slope[:, None] * rounded) + of_row[:, None] * rounded",
        ("tests/test_ksd_to_normal.py", "-k", "triton_in_float32"),
    ),
    Fault(
        "CPU: the padding of a group has a weight",
        "fastvae/cpu/quadratic_form.py",
        "        v = v[source] * kept[:, None]\n",
        "        v = v[source]\n",
        ("tests/test_quadratic_form.py",),
    ),
    Fault(
        "CPU, second derivative: the sign of s",
        "fastvae/cpu/kernel_hvp.py",
        "x, y, sign = self.x, self.y, -1 if self.radial else 1",
        "x, y, sign = self.x, self.y, 1",
        HVP_CPU,
    ),
    Fault(
        "CPU, second derivative: a tile of one sample is not mirrored",
        "fastvae/cpu/kernel_hvp.py",
        "            elif i != j:\n",
        "            elif False:\n",
        HVP_CPU,
    ),
    Fault(
        "CPU, second derivative: slopes of bandwidths are not weighted by the square of their ratio",
        "fastvae/cpu/tiles.py",
        "weight * ratio * ratio, second)",
        "weight * ratio, second)",
        HVP_CPU,
    ),
    Fault(
        "CPU, second derivative: distances of near pairs are those of products",
        "fastvae/cpu/tiles.py",
        "self.exact = kernel.kernel.slope_takes_distance if second_derivative else kernel.kernel.takes_distance",
        "self.exact = kernel.kernel.takes_distance",
        HVP_CPU,
    ),
    Fault(
        "CPU, second derivative of few rows: the result to one sample is that through one of its places",
        "fastvae/cpu/kernel_hvp.py",
        "kernel.radial).mul_(2 if same else 1)",
        "kernel.radial)",
        HVP_CPU,
    ),
    Fault(
        "second derivative of MMD²: the unbiased estimator has the factor of the biased one",
        "fastvae/ops/mmd_problem.py",
        "1 / (1 - squares) if problem.unbiased and not is_fixed else 1.0",
        "1.0",
        ("tests/test_kernel_hvp.py", "-k", "test_mmd and cpu and unbiased"),
    ),
    Fault(
        "second derivative of MMD² to N(0, I): without the curvature of the prior's term",
        "fastvae/cpu/closed_forms.py",
        " - (terms @ steepness)[..., None] * along * rows",
        "",
        ("tests/test_kernel_hvp.py", "-k", "test_to_normal and cpu"),
    ),
    Fault(
        "second derivative: a direction is that of this rank's rows alone",
        "fastvae/ops/common.py",
        '[direction.detach()], group, "biased")',
        '[0 * direction.detach()], group, "biased")',
        ("tests/test_distributed.py", "-k", "test_on_ranks and 2"),
    ),
    Fault(
        "second derivative: upstreams of other ranks are taken for that of this one",
        "fastvae/distributed.py",
        "        if ctx.twice:\n            return _sum_over_ranks(grads[0], ctx.group), None\n",
        "",
        ("tests/test_distributed.py", "-k", "test_on_ranks and 2"),
    ),
    Fault(
        "a second derivative takes bandwidths for constants",
        "fastvae/ops/mmd.py",
        'numbers = [t if t is None else forbid_bandwidth_derivative("mmd", t) for t in given[KERNEL : KERNEL + 2]]',
        "numbers = given[KERNEL : KERNEL + 2]",
        ("tests/test_kernel_hvp.py", "-k", "bandwidths_say"),
    ),
    Fault(
        "few rows: one input that depends on another gets its gradient twice in a second derivative",
        "fastvae/ops/log_kernel_density.py",
        "views = [t if t is None else t.view_as(t) for t in (x, y, third)]",
        "views = [x, y, third]",
        ("tests/test_transforms.py", "-k", "create_graph and kernel_matmul"),
    ),
    Fault(
        "CPU: a row's pair with itself is not left out",
        "fastvae/cpu/tiles.py",
        "                    t.fill_diagonal_(0)\n",
        "                    pass\n",
        MMD_CPU,
    ),
    Fault(
        "CPU: lost diagonal of K_xx",
        "fastvae/cpu/closed_forms.py",
        "        value = sample.sum_of_squares * kernel.kernel.value_at_zero * (1 - kernel.subtract_constant)\n",
        "        value = torch.zeros_like(kernel.subtract_constant)\n",
        MMD_CPU,
    ),
    Fault(
        "CPU: wrong sign of φ'",
        "fastvae/cpu/families.py",
        "mul_(-(alpha + 1) * LOG2_E))\n",
        "mul_(-(alpha + 1) * LOG2_E)).neg_()\n",
        MMD_CPU,
    ),
    Fault(
        "CPU: tiles one row short",
        "fastvae/cpu/tiles.py",
        "slice(first, min(first + size, rows))",
        "slice(first, min(first + size - 1, rows))",
        ("tests/test_mmd.py", "-k", "test_cpu and several"),
    ),
    Fault(
        "CPU: no centring",
        "fastvae/cpu/tiles.py",
        "        return (z.to(self.centre.dtype) - self.centre).to(self.dtype)\n",
        "        return z.to(self.dtype)\n",
        ("tests/test_mmd.py", "-k", "test_cpu and (far or clusters)"),
    ),
    Fault(
        "CPU: sums of a tile in float16",
        "fastvae/cpu/mmd.py",
        "        return float(k.sum(1).sum(dtype=torch.float64)) / (len(a) * len(b))\n",
        "        return float(k.half().sum(1).sum(dtype=torch.float64)) / (len(a) * len(b))\n",
        MMD_CPU,
    ),
    Fault(
        "CPU: tiles right of the diagonal count once",
        "fastvae/cpu/mmd.py",
        "* (1 if i == j else 2)\n",
        "* 1\n",
        ("tests/test_mmd.py", "-k", "test_cpu and several"),
    ),
    Fault(
        "Inductor: the gradient of the rows of the second half is missing",
        "fastvae/cpu/inductor.py",
        "self._rows(a, second, a, first, scale)",
        "self._rows(a, second, a, slice(0, 0), scale)",
        ("tests/test_inductor.py", "-k", "one and bandwidth and mmd and not normal"),
    ),
    Fault(
        "weights of x and y swapped in the values of K_xy",
        "fastvae/cpu/mmd.py",
        "    return float(a.weights[i].double() @ (k @ b.weights[j]).double())\n",
        "    return float(a.weights[i].double() @ (k @ b.weights[j].flip(0)).double())\n",
        MMD_CPU,
    ),
    Fault(
        "CPU: the moments of the constant are not added",
        "fastvae/cpu/mmd.py",
        "            a.moments += b.weighted.sum(1, keepdim=True) * (scale * self.host_sum.slope_constant)\n",
        "            pass\n",
        MMD_CPU,
    ),
    Fault(
        "Triton: products for a function of the root where many pairs are near",
        "kernels/prepare.py",
        "            precision_pass = tl.where(near > 1.0, 1, precision_pass)\n",
        "            pass\n",
        ("tests/test_mmd.py", "-k", "many_pairs_are_near"),
    ),
    Fault(
        "unbiased: N² for N(N − 1)",
        "fastvae/cpu/closed_forms.py",
        "            scale = 1 / (1 - 1 / total) if unbiased else 1.0\n",
        "            scale = 1.0\n",
        MMD_CPU,
    ),
    Fault(
        "CPU: k − 1 nowhere, so that a nearly constant kernel loses its digits",
        "fastvae/kernel_sums.py",
        "SHIFT_BELOW = 0.2\n",
        "SHIFT_BELOW = 0.0\n",
        ("tests/test_mmd.py", "-k", "nearly_constant"),
    ),
    Fault(
        "CPU: distances of near rows from products in float32",
        "fastvae/cpu/tiles.py",
        "if self._least(out, diagonal) >= max(LEAST_SHARE * largest, LEAST_SQUARE):",
        "if self._least(out, diagonal) >= -1:",
        NEAR_ROWS,
    ),
    Fault(
        "CPU: moments of near rows in float32",
        "fastvae/cpu/tiles.py",
        "if is_far or self._is_near:",
        "if is_far:",
        NEAR_ROWS,
    ),
    Fault(
        "CPU, few rows: distances of near rows from products in float32",
        "fastvae/cpu/small.py",
        "or least >= LEAST_SHARE * reach:",
        "or least >= -1:",
        NEAR_ROWS,
    ),
    Fault(
        "CPU, few rows: the distances of near pairs from products",
        "fastvae/cpu/small.py",
        "    squares[pairs] = d2.mul_(factor)\n",
        "",
        ("tests/test_hostile.py", "-k", "refined"),
    ),
    Fault(
        "CPU, few rows: moments of near rows in float32",
        "fastvae/cpu/small.py",
        "in_float32 and least >= LEAST_SHARE_OF_MOMENTS * reach",
        "in_float32",
        NEAR_ROWS,
    ),
    Fault(
        "CPU: a root's near pairs by products",
        "fastvae/cpu/tiles.py",
        "        if least < near:\n",
        "        if False:\n",
        ("tests/test_properties.py::test_mmd",),
    ),
    Fault(
        "reference: the distance of a nan is zero",
        "fastvae/radial.py",
        '    """√t, with derivative 0 at 0."""\n    zero = t <= 0\n',
        "    zero = ~(t > 0)\n",
        ("tests/test_properties.py", "-k", "not_finite"),
    ),
    Fault(
        "closed form: h² + 2 for h² + 1",
        "fastvae/kernel_sums.py",
        "x.square().sum(-1, keepdim=True) / (h2 + 1))",
        "x.square().sum(-1, keepdim=True) / (h2 + 2))",
        ("tests/test_mmd_reference.py",),
    ),
    Fault(
        "reparameterize_kl: backward ignores the noise",
        "fastvae/cpu/reparameterize_kl.py",
        "    term = torch.mul(dz, eps, out=",
        "    term = torch.mul(dz, 0 * eps, out=",
        ("tests/test_reparameterize_kl.py", "-k", "cpu and values"),
    ),
    Fault(
        "reparameterize_kl: a block's KL replaces those before it",
        "fastvae/cpu/reparameterize_kl.py",
        "        if first:\n            sums.copy_(part)",
        "        if True:\n            sums.copy_(part)",
        ("tests/test_layouts.py", "-k", "every_layout and 40"),
    ),
    Fault(
        "reparameterize_kl: a value outside of the bounds has a gradient",
        "fastvae/cpu/reparameterize_kl.py",
        "    if parametrisation.bounds is not None:\n        # A tenth",
        "    if parametrisation.bounds is None:\n        # A tenth",
        ("tests/test_layouts.py", "-k", "every_layout and 40"),
    ),
    Fault(
        "reparameterize_kl: the generator is ignored",
        "fastvae/functional.py",
        "    return torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)\n",
        "    return torch.randn_like(mu)\n",
        ("tests/test_reparameterize_kl.py", "-k", "cpu and generator"),
    ),
    Fault(
        "total_correlation: log-sum-exp without its maximum",
        "fastvae/cpu/total_correlation.py",
        "            reference = self.maximum(rows)\n",
        "            reference = torch.zeros_like(total)\n",
        ("tests/test_total_correlation.py", "-k", "cpu and far"),
    ),
    Fault(
        "total_correlation: rows far from every posterior stay in float32",
        "fastvae/cpu/total_correlation.py",
        "        return self.dtype == torch.float32 and",
        "        return False and",
        ("tests/test_properties.py", "-k", "no_posterior"),
    ),
    Fault(
        "sigreg: 2·cos(2θ) from the cosine, which loses digits at small θ",
        "fastvae/cpu/sigreg.py",
        "torch.mul(current[0, 1], current[0, 1], out=current[1, 0]).mul_(-2).add_(1)",
        "torch.mul(current[0, 0], current[0, 0], out=current[1, 0]).mul_(2).sub_(1)",
        ("tests/test_sigreg.py", "-k", "cpu and float32_is"),
    ),
    Fault(
        "sigreg: each rank's mean in the place of the global one",
        "fastvae/sliced.py",
        "sums, n = total[:-1].view_as(sums), total[-1].detach()",
        "n = total[-1].detach() / torch.distributed.get_world_size(process_group)",
        ("tests/test_sigreg.py", "-k", "on_ranks and 2"),
    ),
    Fault(
        "Triton: sigreg counts the rows that fill its last tile",
        "kernels/sigreg.py",
        "        one = tl.where(mask_n, 1.0, 0.0)",
        "        one = tl.where(mask_n, 1.0, 1.0)",
        ("tests/test_sigreg.py", "-k", "triton and values"),
    ),
    Fault(
        "median: near pairs far from the others by products",
        "fastvae/bandwidths.py",
        "            if float(d2.amin()) < _CANCELLED * (most + more):\n",
        "            if False:\n",
        ("tests/test_bandwidths.py", "-k", "far_from"),
    ),
    Fault(
        "log densities, Triton: the slope of Matérn 5/2 is that of Matérn 3/2",
        "kernels/families.py",
        "            ratio += u\n",
        "",
        ("tests/test_log_kernel_density.py", "-k", "test_triton and matern52"),
    ),
    Fault(
        "log densities, CPU: the slope of Matérn 3/2 lacks its factor",
        "fastvae/cpu/families.py",
        "        return 3.0\n",
        "        return 1.0\n",
        ("tests/test_log_kernel_density.py", "-k", "values and matern32"),
    ),
    Fault(
        "log densities: rows without an upstream gradient count for a row of weight zero",
        "fastvae/ops/log_kernel_density.py",
        "row.masked_fill(g[..., 0] == 0, math.inf)",
        "row",
        ("tests/test_log_kernel_density.py", "-k", "weights_of_zero and cpu"),
    ),
    Fault(
        "sigreg, CPU: the rounding of base·directions turns all rows alike",
        "fastvae/cpu/sigreg.py",
        "        torch.mm(z.flatten(0, 1), self.directions[:, slices], out=x.flatten(0, 1))\n        x.mul_(self.points.base)\n",
        "        torch.mm(z.flatten(0, 1), self.directions[:, slices] * self.points.base, out=x.flatten(0, 1))\n",
        ("tests/test_sigreg.py", "-k", "far_from"),
    ),
    Fault(
        "log_kernel_density: sums of a tile are not scaled by the highest exponent of the next",
        "fastvae/cpu/log_kernel_density.py",
        "(highest[i] - higher).exp2_().mul_(sums[i]).add_(value.sum(1))",
        "sums[i].add(value.sum(1))",
        ("tests/test_log_kernel_density.py", "-k", "several_tiles"),
    ),
    Fault(
        "kernel_matmul, normalised: the sums of rows get no gradient",
        "fastvae/ops/log_kernel_density.py",
        "    of_rows = -row_share * (g * out)",
        "    of_rows = 0 * (g * out)",
        ("tests/test_log_kernel_density.py", "-k", "gradcheck"),
    ),
    Fault(
        "drifting: the mean square of a field is that of each class",
        "fastvae/drifting.py",
        "factors = (inner.diagonal(dim1=1, dim2=2).sum(0) / (count * numbers))",
        "factors = (inner.diagonal(dim1=1, dim2=2)[0] / numbers)",
        ("tests/test_drifting.py", "-k", "loss_and_gradient"),
    ),
    Fault(
        "Triton: log sums take the padding for rows",
        "kernels/kernel_matmul.py",
        "out = torch.full((self.rows,), torch.inf,",
        "out = torch.full((self.rows,), 0.0,",
        ("tests/test_log_kernel_density.py", "-k", "duplicates and laplace"),
    ),
    Fault(
        "Triton: the second derivative of the rational quadratic lacks one of its power",
        "kernels/families.py",
        "        derivative = neg_dphi * (parameters[FIRST] + 1.0) / (1.0 - t)\n",
        "        derivative = neg_dphi * parameters[FIRST] / (1.0 - t)\n",
        ("tests/test_kernel_hvp_kernels.py", "-k", "families and RationalQuadratic"),
    ),
    Fault(
        "Triton, kernel_hvp: the distance of near rows is that of products",
        "kernels/kernel_hvp.py",
        "            if tl.max(near) >= 0.0:\n",
        "            if tl.max(near) >= 1e30:\n",
        ("tests/test_kernel_hvp_kernels.py", "-k", "near_pairs or identical"),
    ),
    Fault(
        "Triton, kernel_hvp: the change of a pair lacks what belongs to the column alone",
        "kernels/kernel_hvp.py",
        "                change += tl.load(directions.neg_half_norm2_ptr + offs_m)[None, :]\n",
        "                change += 0.0\n",
        ("tests/test_kernel_hvp_kernels.py", "-k", "families and RBF"),
    ),
    Fault(
        "Triton, kernel_hvp: the result to one sample is that through one of its places",
        "kernels/kernel_hvp.py",
        "(1.0 if WITHIN else 0.5)",
        "0.5",
        ("tests/test_kernel_hvp_kernels.py", "-k", "families and RBF"),
    ),
    Fault(
        "kernel_matmul: gradient to v of the rows not of the columns",
        "fastvae/cpu/kernel_matmul.py",
        "                tiles.add_product(out[:, j], grad_t[:, i], k, 1.0)\n",
        "                out[:, j].addmm_(v_t[:, j], k.T @ k)\n",
        ("tests/test_kernel_matmul.py", "-k", "not triton and values"),
    ),
    Fault(
        "group_mmd: rounded weights are not divided by their sum",
        "fastvae/functional.py",
        "(exact.sum(0), exact.T @ exact, members)",
        "(torch.ones_like(exact[0]), exact.T @ exact, members)",
        ("tests/test_properties.py", "-k", "groups_under"),
    ),
    Fault(
        "group_mmd of few rows: the gradient of a uniform upstream for any",
        "fastvae/ops/quadratic_form.py",
        "given is None and not any(grad.stride())",
        "given is None",
        ("tests/test_quadratic_form.py", "-k", "one_mmd_a_pair and any"),
    ),
    Fault(
        "Triton: the upstream of a pair counts without that of its opposite",
        "kernels/quadratic_form.py",
        "            both += tl.load(upstream_ptr + h[None, :] * stride_g + g[:, None] * stride_h, mask=pairs, other=0.0).to(tl.float64)\n",
        "            both += both\n",
        ("tests/test_quadratic_form.py", "-k", "one_mmd_a_pair and any"),
    ),
    Fault(
        "Triton: a padded column counts",
        "kernels/mmd.py",
        "        value += padded * value_constant\n",
        "",
        MMD_TRITON,
    ),
    Fault(
        "Triton: the pairs of a row with itself stay in the products",
        "kernels/mmd.py",
        "        tile = tl.where(offs_n[:, None] != offs_m[None, :], tile, 0.0)\n",
        "        tile = tl.where(offs_n[:, None] >= 0 * offs_m[None, :], tile, 0.0)\n",
        MMD_TRITON,
    ),
    Fault(
        "Triton: the symmetric half without its factor of 2",
        "kernels/mmd.py",
        "        value_acc += value_acc\n",
        "        value_acc += 0.0\n",
        MMD_TRITON,
    ),
    Fault(
        "Triton: weights of the columns dropped from the gradient",
        "kernels/mmd.py",
        "        slope = _counted(slope, offs_n, offs_m, last_m, weight_ptr, DIAGONAL, SPEC)\n",
        "        slope = tl.where(offs_n[:, None] != offs_m[None, :], slope, 0.0) if DIAGONAL else slope\n",
        MMD_TRITON,
    ),
    Fault(
        "Triton: slope of the inverse multiquadric is k and not k²",
        "kernels/families.py",
        "        value = root * root\n        neg_dphi = value * value\n",
        "        value = root * root\n        neg_dphi = value\n",
        ("tests/test_mmd.py", "-k", "test_triton and RationalQuadratic or IMQ"),
    ),
    Fault(
        "Triton: tf32 products of points that are not rounded, as their norms are not",
        "kernels/products.py",
        "        hi = round_tf32(scaled)\n",
        "        hi = scaled\n",
        ("tests/test_mmd.py", "-k", "equal_rows"),
    ),
    Fault(
        "Triton: the gradient of the other sample's columns has the wrong sign",
        "kernels/prepare.py",
        "    tl.store(plan_ptr + (OTHER_GRADIENT + 1), -x_mean)\n",
        "    tl.store(plan_ptr + (OTHER_GRADIENT + 1), x_mean)\n",
        MMD_TRITON,
    ),
    Fault(
        "CPU: the rows of a tile stay those of the one before",
        "fastvae/cpu/tiles.py",
        "if self._left is None or self._left[0] is not a or self._left[1] != i:",
        "if self._left is None or self._left[0] is not a:",
        ("tests/test_mmd.py", "-k", "test_cpu and several"),
    ),
    Fault(
        "CPU: oneDNN's product is not scaled",
        "fastvae/cpu/tiles.py",
        "            total.add_(multiply(self._onednn, left, right), alpha=scale)\n",
        "            total.add_(multiply(self._onednn, left, right))\n",
        ("tests/test_mmd.py", "-k", "test_cpu and tiles"),
    ),
    Fault(
        "Triton: noise of every row from the first row's counter",
        "kernels/reparameterize_kl.py",
        "    row = first_n + tl.arange(0, BLOCK_N)[:, None] + tl.zeros_like(quad)\n",
        "    row = first_n + 0 * tl.arange(0, BLOCK_N)[:, None] + tl.zeros_like(quad)\n",
        ("tests/test_reparameterize_kl.py", "-k", "noise_of_the_kernels"),
    ),
    Fault(
        "Triton: noise of every image from the first image's counters",
        "kernels/reparameterize_kl.py",
        "normal(tl.load(noise.ptr), place.b * sizes.R + place.first_r, ",
        "normal(tl.load(noise.ptr), place.first_r, ",
        ("tests/test_reparameterize_kl_kernels.py", "-k", "noise_is"),
    ),
    Fault(
        "Triton: a padded element has a KL",
        "kernels/reparameterize_kl.py",
        "        MASK_KL=not zero,\n",
        "        MASK_KL=False,\n",
        ("tests/test_reparameterize_kl_kernels.py", "-k", "values"),
    ),
    Fault(
        "Triton: the logarithm of softplus loses the digits of small exponentials",
        "kernels/reparameterize_kl.py",
        "tl.log(u) + (e - (u - 1)) / u",
        "tl.log(u)",
        ("tests/test_reparameterize_kl_kernels.py", "-k", "accurate"),
    ),
    Fault(
        "Triton: the gradient to a value at a bound is lost",
        "kernels/reparameterize_kl.py",
        "(q.unbounded_s > SPEC.HIGH)",
        "(q.unbounded_s >= SPEC.HIGH)",
        ("tests/test_reparameterize_kl_kernels.py", "-k", "bound"),
    ),
    Fault(
        "reparameterize_kl: the second derivative takes the noise of rows without gaps",
        "fastvae/ops/reparameterize_kl.py",
        "_zeros_in_the_place_of(t) for t in (mu, s)",
        "torch.zeros_like(t, dtype=accumulation_dtype(t.dtype)) for t in (mu, s)",
        ("tests/test_reparameterize_kl_kernels.py", "-k", "gradcheck"),
    ),
    Fault(
        "CPU: a fixed sample keeps the constants of its pairs",
        "fastvae/cpu/mmd.py",
        "(y_norm - kernels.value_constant)",
        "y_norm",
        ("tests/test_kernel_mean.py", "-k", "dense_formula"),
    ),
    Fault(
        "Triton: a fixed sample keeps the constants of its pairs",
        "fastvae/ops/mmd_problem.py",
        "(problem.y_norm - constant)",
        "problem.y_norm",
        ("tests/test_kernel_mean.py", "-k", "test_triton"),
    ),
    Fault(
        "KernelMean: what weights lack of one is not taken back",
        "fastvae/kernel_mean.py",
        "(2 * rest).to(z.dtype)",
        "(0 * rest).to(z.dtype)",
        ("tests/test_kernel_mean.py", "-k", "own_weights"),
    ),
    Fault(
        "KernelMean: rows drawn from a stream are its first ones",
        "fastvae/kernel_mean.py",
        "rows[order[: self.size]]",
        "rows[: self.size]",
        ("tests/test_kernel_mean.py", "-k", "drawn_from"),
    ),
    Fault(
        "Triton: the slope of a distance in a sum lacks the root of one half",
        "kernels/families.py",
        "tl.sqrt(0.5 * ratio)",
        "tl.sqrt(ratio)",
        ("tests/test_kernel_sums.py", "-k", "triton and values"),
    ),
    Fault(
        "Triton: a power in a sum is scaled without its exponent",
        "kernels/families.py",
        "ratio = ratio / values[2 * KERNELS + PART.first_parameter]",
        "ratio = ratio * 1.0",
        ("tests/test_kernel_sums.py", "-k", "triton and values"),
    ),
    Fault(
        "Triton: the parts of a sum share the parameters of the first",
        "kernels/families.py",
        "parts.append(part._replace(first_parameter=parameters))",
        "parts.append(part)",
        ("tests/test_kernel_sums.py", "-k", "triton and values"),
    ),
    Fault(
        "Triton: a Riesz kernel in a sum adds one on the diagonal",
        "kernels/prepare.py",
        "        weights += _unless_homogeneous(weight, b, FAMILY)\n",
        "        weights += weight\n",
        ("tests/test_kernel_sums.py", "-k", "triton and values"),
    ),
    Fault(
        "Triton: padded columns of a sum count as rows far away",
        "kernels/sums.py",
        "tl.where(padded, -value_constant, value)",
        "value",
        ("tests/test_kernel_sums.py", "-k", "triton and (values or narrow)"),
    ),
    Fault(
        "Triton: sums of narrow kernels are computed by products that the widest allows",
        "kernels/prepare.py",
        "narrowest = tl.maximum(narrowest, _unless_homogeneous(gammas[b], b, FAMILY))",
        "narrowest = gammas[0]",
        ("tests/test_kernel_sums.py", "-k", "triton and narrow"),
    ),
]


def occurrences(fault: Fault) -> int:
    return (ROOT / fault.path).read_text().count(fault.old)


def run(fault: Fault) -> tuple[str, float]:
    """ "found" if its tests turn red, "survived" if they stay green, "stale" if the text to replace is not there once; and the seconds."""
    start = time.monotonic()
    if occurrences(fault) != 1:
        return "stale", 0.0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("fastvae", "kernels", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "README.md"):
            shutil.copy(ROOT / name, copy)
        path = copy / fault.path
        path.write_text(path.read_text().replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    # 1: tests failed. Others: none was selected, or pytest itself could not run.
    outcome = {0: "survived", 1: "found"}.get(result.returncode, f"pytest ended with {result.returncode}")
    return outcome, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults whose names begin so; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time, each with one thread")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if not arguments.names or fault.name.startswith(tuple(arguments.names))]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = []
        for fault, (outcome, seconds) in zip(faults, pool.map(run, faults), strict=True):
            outcomes.append(outcome)
            print(f"{outcome:9}  {seconds:5.0f} s  {fault.name}  ({fault.path})", flush=True)  # noqa: T201
    found = outcomes.count("found")
    print(f"{found} of {len(faults)} faults turned a test red")  # noqa: T201
    return 0 if faults and found == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
