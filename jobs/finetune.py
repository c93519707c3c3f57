"""Fine-tune an artifact: all of its weights, those that no pattern freezes, or a LoRA adapter beside them.

python jobs/finetune.py --recipe demo-lora --model.init-from out/artifact --data.dataset out/data --name tuned
"""

from mqwen import cli
from mqwen.train.command_line import read_settings
from mqwen.train.settings import SettingsError


def main() -> None:
    settings = read_settings(__doc__)
    if not settings.model.init_from:
        raise SettingsError("--model.init-from is missing: give the artifact to fine-tune; jobs/export.py writes one")
    from mqwen.training import run_training  # brings torch and Ray, for which a wrong option need not wait

    run_training(settings)


if __name__ == "__main__":
    cli.run(main)
