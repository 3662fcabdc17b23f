"""Model folders that a run reads and writes, its checkpoints, and its curves.

folders.py      names of models -> local folders; their configs and tokenizers
runs.py         the folder of a run: settings, versions, metrics
vocabulary.py   refuses a reference of other tokens
unfinished.py   what to do about a run that was killed
refusals.py     the errors of folders.py
body.py         bodies that transformers does not name
heads.py        reward models from the files of a language model
slices.py       safetensors files -> sharded parameters: each rank reads its own slices
digest.py       a hash of the files of a model
shards.py       which rows of a parameter a rank has
convert.py      the same where transformers must convert the tensors (mixture-of-experts)
write.py        sharded parameters -> safetensors files in Hugging Face format
repeat.py       --args: the flags of another run
resume.py       checkpoints of a run: writes them, and continues from one
checksums.py    a changed bit in a file is an error
room.py         the errors of a full disk, and what is kept then
damaged.py      the error of a damaged checkpoint, and how to go on
unpickle.py     files of checkpoints -> values, without running what they name
rounding.py     what is left of a training in bfloat16
occupied.py     what is in --out before a run
best.py         keeps the best weights
curves.py       draws and prints the result of a run
card.py         the model card, README.md of a result, by card.jinja
portable.py     what older programs read of a model, and know by other names
index.py        the index of several safetensors files
"""

import argparse
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number

    add, count = parser.add_argument_group("checkpoints").add_argument, number(int, 1)
    add("--save_every", type=count, metavar="STEPS",
        help="write a checkpoint every so many steps and after the last; default: none is "
        "written")  # fmt: skip
    add("--keep", type=count, default=2, metavar="COUNT", help="how many checkpoints are kept")
    add("--stop_after", type=count, metavar="STEP",
        help="write a checkpoint after this step, and end; default: the last step")  # fmt: skip
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add(
        "--keep_best",
        action="store_true",
        help="the weights with the lowest held-out loss become the result, not the last",
    )
    add("--patience", type=count, metavar="COUNT",
        help="end the run after so many evaluations without a lower held-out loss, and keep the "
        "best weights; default: it goes on")  # fmt: skip
    add("--args", metavar="FILE",
        help="repeat the run of this args.json; flags beside it count more; default: "
        "none")  # fmt: skip
    parser.lazy.append(partial(repeated, parser))
    add("--save_dtype", choices=("fp32", "bf16"), default="fp32",
        help="of the weights in --out; bf16 rounds small changes away, and prints how "
        "many")  # fmt: skip
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Why --resume or --keep_best is refused, or None. It is called before anything is loaded."""
    if keeps_best(args) and not (args.eval_data or args.eval_share):
        return "--keep_best and --patience need held-out pairs; give --eval_data or --eval_share"
    if not args.resume:
        return None
    from nanoalign.checkpoints import resume

    return resume.refusal(args)


def repeated(parser: argparse.ArgumentParser, argv: list[str]) -> list[str] | None:
    """A command line with the flags of its --args, if it has that."""
    if "--args" not in [word.partition("=")[0] for word in argv]:
        return None
    from nanoalign.checkpoints.repeat import expand

    return expand(parser, argv)


def keeps_best(args: Namespace) -> bool:
    return args.keep_best or args.patience is not None


def of_run(model, optimizer, objective, rows, args: Namespace, world, folders: dict) -> tuple:
    """(the `save` of loop.train, the number of steps that were done before, what writes the model).

    A collective. folders: of the models that are read, by the flag that names each. What writes the
    model is a context: if that fails, a checkpoint keeps what was trained.
    Raises RunError if the disk has less room than the model needs.
    """
    from nanoalign.errors import RunError
    from nanoalign.hosts.collectives import on_main
    from nanoalign.hosts.signals import received, stopping
    from nanoalign.loop import total_steps

    save, start, best = (lambda step, last, metrics: None), 0, None
    if keeps_best(args):
        from nanoalign.checkpoints.best import Best

        best = Best(model, objective, args.patience)  # first, as it is part of a checkpoint

    def checkpoints():
        from nanoalign.checkpoints.resume import Checkpoints

        return Checkpoints(model, optimizer, objective, rows, args, world, folders)

    def stop(step: int, number: int) -> Exception:
        from nanoalign.hosts import stopped

        return stopped.stop(checkpoints(), step, number)

    def check_room() -> None:
        size = model.count_parameters() * (2 if args.save_dtype == "bf16" else 4)
        if args.save_every or args.stop_after:  # a parameter and the two moments of AdamW
            size += 12 * model.count_parameters(trainable=True)
        if shutil.disk_usage(args.out).free < size:
            from nanoalign.checkpoints.room import too_little

            raise too_little(args.out, size)

    @contextmanager
    def writing() -> Iterator[None]:
        try:
            with received:  # a signal waits until the model is written
                yield
        except (OSError, RunError) as error:
            from nanoalign.checkpoints.room import kept

            raise kept(checkpoints(), total_steps(len(rows), args), error) from error

    on_main(world, check_room)
    if args.save_every or args.stop_after or args.resume:
        save = checkpoints()
        start = save.resume() if args.resume else 0
    if best:
        start = best.resume(start, total_steps(len(rows), args))
        save = partial(best, save=save)
    return stopping(save, stop), start, writing()


def report_rounding(model, objective, held_out: dict, batches, args: Namespace) -> None:
    """Prints what --save_dtype does to the held-out loss, after the model is written."""
    if args.save_dtype == "bf16":
        from nanoalign.checkpoints.rounding import report_loss

        report_loss(model, objective, held_out, batches, args)
