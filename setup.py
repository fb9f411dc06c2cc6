"""Packaging of ddpm_lit: everything that varies is read from settings.ini."""

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithModels(build_py):
    "Put the models of models/ into the package, where `ddpm_lit.pretrained` looks for them."

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("models", Path(self.build_lib, "ddpm_lit", "models"), dirs_exist_ok=True)


config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def description() -> str:
    "Return the README with absolute links, as a package index needs them."
    raw = cfg["git_url"].replace("github.com", "raw.githubusercontent.com") + f"/{cfg['branch']}/"
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{raw}", text)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?:|#)", rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", text)


names = ("notebooks", "data", "tracking", "emoji", "stable-diffusion", "book", "dev")
extras = {name: cfg[f"{name.replace('-', '_')}_requirements"].split() for name in names}
extras["dev"] = sorted({r for requirements in extras.values() for r in requirements})
extras["bench"] = cfg["bench_requirements"].split()  # apart: one of the peers asks for torchvision

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    cmdclass={"build_py": BuildWithModels},
    packages=find_packages(include=["ddpm_lit", "ddpm_lit.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
