"""What pyproject.toml cannot say: the jobs, which lie beside src/, are part of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src", include=["fedfms", "fedfms.*"]), "fedfms.jobs"],
    package_dir={"": "src", "fedfms.jobs": "jobs"},
)
