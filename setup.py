"Everything about this distribution is read from settings.ini."
import configparser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = configparser.ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def words(key):
    "A setting as a list of words: requirements hold no blanks within."
    return settings[key].split()


SUFFIX = "_requirements"
extras = {key.removesuffix(SUFFIX): words(key) for key in settings if key.endswith(SUFFIX)}
extras["all"] = sorted({requirement for needed in extras.values() for requirement in needed})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    include_package_data=True,
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
