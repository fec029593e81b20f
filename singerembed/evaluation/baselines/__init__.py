"""Baseline models to compare encoders with: MFCC statistics, GE2E, Fast ResNet-34, H/ASP, wav2vec 2.0, XLSR-53."""
