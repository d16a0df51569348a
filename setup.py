"""What setup.cfg cannot say: the folder `configs` is the package `gpt2_flax.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gpt2_flax*"]), "gpt2_flax.configs"],
    package_dir={"gpt2_flax.configs": "configs"},
)
