"""The registered model: MLflow runs this file to load a version (pyfunc, models from code).

Input: a table with the column `image`, base64 of a DICOM or PNG file. Output: a table with the column `report`. The
version's configuration names the checkpoint in the model store and its sha256.
"""

from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc import PythonModel


class BadImage(MlflowException):
    """An error that says of an image where it stands in the request, and nothing else.

    MLflow's scoring server writes the beginning of the request into the message of an MlflowException, and what an
    image's first bytes hold may be a name.
    """

    def __init__(self, said: str) -> None:
        self._said = said
        super().__init__(said, error_code=BAD_REQUEST)

    @property
    def message(self) -> str:
        """What was said when it was raised."""
        return self._said

    @message.setter
    def message(self, value: str) -> None:
        """Let later words be."""


class ReportModel(PythonModel):
    """Writes a report per image."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint; raise IntegrityError where it is not the one that was registered."""
        from valor.serving.reporter import Reporter

        config = context.model_config
        self._reporter = Reporter.open(
            config["checkpoint_uri"], sha256=config["sha256"], image_px=int(config.get("image_px") or 0)
        )

    def predict(self, context, model_input, params=None):  # MLflow warns of type hints that are not its own
        """Return a DataFrame with the column `report`, one row per row of `model_input`."""
        import pandas as pd

        from valor.errors import UserError
        from valor.serving.reporter import decode_base64

        try:
            images = [decode_base64(text, place) for place, text in enumerate(model_input["image"])]
            return pd.DataFrame({"report": self._reporter.reports(images)}, index=model_input.index)
        except UserError as error:
            raise BadImage(str(error)) from None


set_model(ReportModel())
