"""Train: Ray Data streams a dataset's packs into Ray Train workers, which train fresh or earlier weights.

python jobs/pretrain.py --recipe demo --data.dataset out/data --tokenizer DIR --name first
"""

from mqwen import cli
from mqwen.train.command_line import read_settings
from mqwen.train.settings import SettingsError


def main() -> None:
    settings = read_settings(__doc__)
    if settings.model.lora.r:
        raise SettingsError(f"--model.lora.r is {settings.model.lora.r}: jobs/finetune.py trains adapters")
    from mqwen.training import run_training  # brings torch and Ray, for which a wrong option need not wait

    run_training(settings)


if __name__ == "__main__":
    cli.run(main)
