"""The bundled calibration corpus, installed as ``quantkit_calibration_data``.  Data only; see README.md beside this file."""
