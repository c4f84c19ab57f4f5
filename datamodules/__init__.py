"""LightningDataModules. Everything a model needs to know of the data comes from here."""

from datamodules.base import Data, DataModule
from datamodules.digits import Digits
from datamodules.environments import Environment, LambdaEnvironment
from datamodules.folder import ImageFolder
from datamodules.images import ByteImages, ImageDataModule, to_uint8
from datamodules.latents import Latents
from datamodules.requests import SampleRequests
from datamodules.splits import DataError, Rows
from datamodules.synthetic import Synthetic
from datamodules.table import Table
from datamodules.torchvision_sets import CIFAR10, MNIST

__all__ = [
    "CIFAR10",
    "MNIST",
    "ByteImages",
    "Data",
    "DataError",
    "DataModule",
    "Digits",
    "Environment",
    "ImageDataModule",
    "ImageFolder",
    "LambdaEnvironment",
    "Latents",
    "Rows",
    "SampleRequests",
    "Synthetic",
    "Table",
    "to_uint8",
]
