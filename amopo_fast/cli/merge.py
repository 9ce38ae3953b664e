"""`amopo-fast merge`: an adapter and its base model into one model."""

from __future__ import annotations

from amopo_fast.cli.outputs import output_folder


def add_parser(commands) -> None:
    parser = commands.add_parser("merge", help="merge a LoRA adapter into its base model, for transformers and vLLM")
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument("output_dir", help="folder to write the merged model to")
    parser.add_argument("--base", help="folder or Hub name of the base model (default: the one the adapter names)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
                        help="of the result (default: the base model's)")  # fmt: skip
    parser.set_defaults(run=run, takes_rest=False)


def run(arguments) -> int:
    from amopo_fast.models.merge import merge_adapter

    output_folder(arguments.output_dir, "output_dir")
    merge_adapter(arguments.adapter, arguments.output_dir, base=arguments.base, dtype=arguments.dtype)
    print(f"merged model: {arguments.output_dir}")
    return 0
