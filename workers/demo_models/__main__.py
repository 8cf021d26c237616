"""The command `python -m workers.demo_models OUT --family NAME`. Prints the folder that it wrote."""

import argparse
import os
from pathlib import Path

from sp_core.torchvision_operators import declare_missing_operators


def main() -> None:
    """Parse the arguments and write the model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    declare_missing_operators()
    from workers.demo_models.writer import FAMILIES, write_demo_model  # now: it loads libraries that read the variable

    parser = argparse.ArgumentParser(description="Write a tiny demo model in diffusers' folder format.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--family", choices=FAMILIES, required=True, help="which kind of model")
    parser.add_argument("--pipeline", help="class of its pipeline, such as one that begins with a picture")
    arguments = parser.parse_args()
    write_demo_model(arguments.out, arguments.family, arguments.pipeline)
    print(arguments.out)


if __name__ == "__main__":
    main()
