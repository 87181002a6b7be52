"""The command line: the verb first, then Hydra overrides. Nothing heavy is imported before the verb runs."""

import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from harness.errors import InputError

HELP = """Benchmark of sparse attention in diffusion transformers.

usage: python -m harness VERB [key=value ...] [--config-dir DIR] [-v]

  sweep         measure cells: sparsity=0.5,0.75 method=pisa,block_topk seed=0,1   (bare: the main job)
  plot          draw tables, plots and videos again from the records in out=
  bench kernel  time one attention call by length, density and engine
  score A B     PSNR, SSIM and LPIPS of two videos, pictures or folders
  list          methods, models, workloads and experiments
  doctor        what this machine can run, and what is missing

`python -m harness VERB --help` tells more. Bad input exits with 2, failed cells with 3.
"""

SWEEP_HELP = """Measure cells and print their table; what has a record is not measured again.

usage: python -m harness sweep [key=value,value ...] [experiment=NAME] [--config-dir DIR] [-v]

Comma lists are swept, no spaces around commas; range(4) and nested keys work too:
  python -m harness sweep sparsity=0.5,0.75,0.875 method=pisa,block_topk seed=0,1,2,3
  python -m harness sweep method=pisa method/tail=drop,zeroth,hybrid method/order=tile_3d,raster
  python -m harness sweep workload=step seed='range(16)' model.dense_steps=0,2
  python -m harness sweep method=mine --config-dir my_conf allow=my_package

An experiment (conf/experiment/) is a saved list of overrides; yours win. All settings of a cell:

{config}
Choices (python -m harness list): method={methods}
  method/order={orders}  method/routing={routings}  method/tail={tails}
"""

PLOT_HELP = """Draw tables, plots and videos again from the records of a results folder.

usage: python -m harness plot [out=results/runs]
"""

BENCH_HELP = """Time one attention call on random inputs: every dense kernel and sparse engine, phase by phase.

usage: python -m harness bench kernel [shape=NAME,NAME] [sparsity=0.5,0.875] [method.engine=NAME,NAME] [key=value ...]

It is `sweep experiment=bench_kernel`, and every override of sweep works:
  python -m harness bench kernel experiment=bench_kernel_gpu method.engine=triton,cudnn,fa4   # sizes of real models
  python -m harness bench kernel experiment=bench_kernel_length                               # the break-even length
  python -m harness bench kernel model.tokens=1024,2048 model.heads=4 model.head_dim=64       # any size
Shapes: `python -m harness list`. Engines that cannot run here are left out of a sweep over several, with a word.
Every row has its error against the float64 formula with the same blocks, and against float64 dense attention.
"""

SCORE_HELP = """PSNR, SSIM, LPIPS and flicker of two videos, pictures, folders of pictures or .safetensors files.

usage: python -m harness score DENSE OTHER [metrics.protocol=v1|svg|fastvideo|sparsevideo]
"""

LIST_HELP = """List methods, their axes, models, workloads and experiments, from the file names of conf/.

usage: python -m harness list [--config-dir DIR]
"""

DOCTOR_HELP = """Say what this machine can run and what is missing, with the command that mends it.

usage: python -m harness doctor [model=NAME] [model.key=value ...]

With a model: its size, the memory it needs, its weights or the command that fetches them, and whether it runs here.
"""


def sweep_help() -> str:
    from harness.config import conf_dir, options

    names = {
        "methods": ",".join(options("method")),
        "orders": ",".join(options("method/order")),
        "routings": ",".join(options("method/routing")),
        "tails": ",".join(options("method/tail")),
    }
    lines = (conf_dir() / "config.yaml").read_text().split("_self_", 1)[1].strip().splitlines()
    return SWEEP_HELP.format(config="".join(f"  {line}\n" for line in lines), **names)


def run_sweep(words: list[str], config_dirs: tuple[Path, ...]) -> int:
    from harness.config import Composer
    from harness.sweep import sweep

    return sweep(words, Composer(config_dirs))


def run_bench(words: list[str], config_dirs: tuple[Path, ...]) -> int:
    from harness.config import Composer
    from harness.sweep import sweep

    if not words or words[0] != "kernel":
        raise InputError(
            f"bench knows `kernel`, got {words[0] if words else 'nothing'!r}: python -m harness bench kernel."
        )
    return sweep(words[1:], Composer(config_dirs), "bench_kernel")


def run_plot(words: list[str], config_dirs: tuple[Path, ...]) -> int:
    from harness.records import load
    from harness.tables import print_tables
    from harness.views import draw

    out = Path("results/runs")
    for word in words:
        key, _, value = word.partition("=")
        if key != "out" or not value:
            raise InputError(f"plot takes only out=FOLDER, got {word!r}.")
        out = Path(value)
    records = load(out)
    draw(records, out)
    print_tables(records)
    print(f"Tables and plots are in {out}/")
    return 0


def run_list(words: list[str], config_dirs: tuple[Path, ...]) -> int:
    from harness.listing import show

    return show(config_dirs)


def run_doctor(words: list[str], config_dirs: tuple[Path, ...]) -> int:
    from harness.doctor import show

    return show(words, config_dirs)


def run_score(words: list[str], config_dirs: tuple[Path, ...]) -> int:
    from harness.score import main as score

    return score(words)


VERBS: dict[str, tuple[Callable[[list[str], tuple[Path, ...]], int], Callable[[], str]]] = {
    "sweep": (run_sweep, sweep_help),
    "plot": (run_plot, lambda: PLOT_HELP),
    "bench": (run_bench, lambda: BENCH_HELP),
    "score": (run_score, lambda: SCORE_HELP),
    "list": (run_list, lambda: LIST_HELP),
    "doctor": (run_doctor, lambda: DOCTOR_HELP),
}


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code. Bad input is one sentence on stderr and 2, a traceback only with -v."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    verb, *rest = argv
    try:
        if verb not in VERBS:
            near = get_close_matches(verb, VERBS, n=1)
            raise InputError(
                f"no verb {verb!r}.{f' Did you mean {near[0]!r}?' if near else ''} Known: {', '.join(VERBS)}."
            )
        run, help_text = VERBS[verb]
        if "-h" in rest or "--help" in rest:
            print(help_text())
            return 0
        words, config_dirs = split_flags(rest)
        return run(words, config_dirs)
    except (InputError, ValueError, TypeError) as error:
        if "-v" in rest:
            raise
        for sentence in str(error).splitlines():
            print(f"harness {verb}: {sentence}", file=sys.stderr)
        return 2


def split_flags(rest: list[str]) -> tuple[list[str], tuple[Path, ...]]:
    """Overrides, and the folders of --config-dir."""
    words, folders, left = [], [], iter(rest)
    for word in left:
        if word == "-v":
            continue
        if word.startswith("--config-dir"):
            folder = word.partition("=")[2] or next(left, "")
            if not folder:
                raise InputError("--config-dir needs a folder: --config-dir my_conf.")
            folders.append(Path(folder))
        elif word.startswith("--"):
            raise InputError(f"no flag {word!r}: settings are key=value, flags are --config-dir DIR, --help and -v.")
        else:
            words.append(word)
    return words, tuple(folders)
