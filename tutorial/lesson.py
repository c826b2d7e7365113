"""What programs of the tutorial share: the path to hd_pissa.py, one thread, checks, figures, counted bytes.

    from lesson import check, received, save_figure

Importing it makes `import hd_pissa` work from a clone and sets torch to one thread, so that what a program
prints is the same on every run.
"""

import atexit
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
torch.set_num_threads(1)

from training.processes import leave_processes  # noqa: E402

atexit.register(leave_processes)        # gloo's threads may abort a process that ends with its group


def check(what: str, got, expected, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Print a line if |got - expected| <= atol + rtol max|expected|, else print both and exit with 1.

    got, expected: tensors, or anything `torch.as_tensor` takes. The default, no tolerance, asks for equality.
    The line says the limit and not the error, whose last digits differ between processors.
    """
    got, expected = torch.as_tensor(got).detach(), torch.as_tensor(expected).detach()
    if got.shape != expected.shape:
        sys.exit(f"FAILED  {what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    got, expected = got.double(), expected.double()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error, limit = float((got - expected).abs().max()) if got.numel() else 0.0, atol + rtol * scale
    if not error <= limit:                      # also for NaN
        sys.exit(f"FAILED  {what}: off by {error:.1e}, allowed {limit:.1e}\n{got}\nexpected\n{expected}")
    how = f"relative error below {rtol:.0e}" if rtol else f"within {atol:g}" if atol else "equal"
    print(f"ok  {what} ({how})")


def save_figure(program: str, draw, columns: int = 1, size=(7.0, 3.4)) -> None:
    """Call draw(axes) and save figures/<name of the program>.svg; without matplotlib, do nothing.

    program   __file__ of the chapter, or its name
    draw      takes one matplotlib axes, or an array of them if `columns` is above 1
    size      width and height in inches

    The bytes depend on what is drawn alone: no date, fixed ids.
    """
    try:
        import matplotlib
    except ImportError:
        print('no figure: pip install ".[tutorial]"', file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "hd_pissa", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False})
    figure, axes = plt.subplots(ncols=columns, figsize=size, layout="constrained")
    draw(axes)
    folder = Path(os.environ.get("TUTORIAL_FIGURES", HERE / "figures"))     # build.py draws elsewhere first
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{Path(program).stem}.svg", metadata={"Date": None})
    plt.close(figure)


def received(work) -> int:
    """Bytes that reach this process in work(), if every collective goes round a ring of K processes.

    Of a gathered or scattered tensor all but the own part, 1 / K, arrives; an all-reduce goes round twice.
    """
    new = hasattr(dist, "all_gather_single")        # torch 2.13 renames two of the three
    rounds = {"all_reduce": (0, 2), "all_gather_single" if new else "all_gather_into_tensor": (0, 1),
              "reduce_scatter_single" if new else "reduce_scatter_tensor": (1, 1)}
    with ExitStack() as patches:
        seen = {name: patches.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
                for name in rounds}
        work()
    whole = sum(times * call.args[which].nbytes for name, (which, times) in rounds.items()
                for call in seen[name].call_args_list)
    return whole * (dist.get_world_size() - 1) // dist.get_world_size()
