"""Train: Ray Data streams a dataset's packs into Ray Train workers, which train fresh or earlier weights.

python jobs/pretrain.py --recipe demo --data.dataset out/data --tokenizer DIR --name first
"""

from mqwen import cli
from mqwen.train.settings import SettingsError
from mqwen.training import read_settings, run_training


def main() -> None:
    settings = read_settings(__doc__)
    if settings.model.lora.r:
        raise SettingsError(f"--model.lora.r is {settings.model.lora.r}: jobs/finetune.py trains adapters")
    run_training(settings)


if __name__ == "__main__":
    cli.run(main)
