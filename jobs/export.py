"""Export: a run's checkpoint as an artifact, a folder of safetensors that serving and `transformers` load.

python jobs/export.py --run out/runs/first --to out/artifact [--step 500] [--form adapter]
"""

from dataclasses import dataclass

import tyro

from mqwen import cli
from mqwen.storage import readable, writable
from mqwen.train.export import Form, export


@dataclass(frozen=True)
class Export:
    """`run` is the run's URI, `to` the artifact's, where an earlier export is replaced; `step` a checkpoint other than
    the newest.

    `form`: artifact, with an adapter merged into the weights; adapter, PEFT's folder of a LoRA run; llava, what
    transformers, vLLM and SGLang load as LlavaForConditionalGeneration.
    """

    run: str
    to: str
    step: int | None = None
    form: Form = "artifact"


def main() -> None:
    command = tyro.cli(Export, description=__doc__)
    step = export(readable(command.run), writable(command.to), command.step, command.form)
    print(f"{command.to}: the {'adapter' if command.form == 'adapter' else 'weights'} of step {step}")


if __name__ == "__main__":
    cli.run(main)
