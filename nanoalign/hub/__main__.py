"""Upload the result of a run to the Hugging Face Hub.

    python -m nanoalign.hub push OWNER/NAME runs/dpo

Weights, config.json, tokenizer, model card, args.json, metrics.jsonl and curves.png are uploaded,
in one commit; checkpoints are not, nor which records were held out. The token is that of
`hf auth login`, or $HF_TOKEN; $HF_ENDPOINT is another Hub.
"""

from pathlib import Path

from nanoalign import hub
from nanoalign.distributed import run
from nanoalign.flags import Parser
from nanoalign.hosts import report_error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m nanoalign.hub")
    hub.add_arguments(parser)
    args = parser.parse_args(argv)
    from nanoalign.hub.push import push

    url = push(args.name, Path(args.folder), args.private, args.revision)
    print(f"{'pushed':<11} {args.folder} to {url}")


if __name__ == "__main__":
    run(main, report_error)
