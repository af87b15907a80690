"""Functions of (rank, world) run on several processes of one Gloo group."""

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing

from tests.processes import context

TIMEOUT = datetime.timedelta(seconds=120)


def run_on_ranks(functions, world, folder, *args):
    """Each of `functions`, one after the other in the same processes, with (rank, world, *args)."""
    multiprocessing.start_processes(_run, (functions, world, str(folder), args), nprocs=world, start_method=context.get_start_method())


def _run(rank, functions, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=TIMEOUT)
    for function in functions:
        function(rank, world, *args)
    dist.destroy_process_group()
    # PyTorch's caches of meshes and graphs hold the group still; its worker that waits for an interpreter that ends aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
