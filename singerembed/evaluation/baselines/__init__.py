"""The models that an encoder is compared with: MFCC statistics, GE2E, Fast ResNet-34, H/ASP, wav2vec 2.0, XLSR-53."""
