"""LightningDataModules. Everything a model needs to know of the data comes from here."""

from datamodules.base import ImageDataModule, to_uint8
from datamodules.digits import Digits
from datamodules.folder import ImageFolder
from datamodules.requests import SampleRequests
from datamodules.torchvision_sets import CIFAR10, MNIST

__all__ = ["CIFAR10", "MNIST", "Digits", "ImageDataModule", "ImageFolder", "SampleRequests", "to_uint8"]
