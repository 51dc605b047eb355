"""EHR foundation models for Hugging Face transformers.

Importing the package registers its configurations, models and tokenizer with the Auto classes, and its pipelines with
the library's; nothing else happens.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .models.configuration_ehrbert import EhrBertConfig
from .models.configuration_ehrconcat import EhrConcatConfig
from .models.configuration_ehrfusion import EhrFusionConfig
from .models.configuration_ehrrnn import EhrRnnConfig
from .models.configuration_ehrseries import EhrSeriesConfig
from .models.configuration_ehrtagger import EhrTaggerConfig
from .models.configuration_ehrtext import EhrTextConfig
from .models.configuration_gbert import GBertConfig
from .models.configuration_medbert import MedBertConfig
from .models.configuration_medhmp import MedHMPConfig
from .models.configuration_medmplm import MedMPLMConfig
from .models.configuration_visitrnn import VisitRnnConfig
from .models.feature_extraction_hourly import HourlyFeatureExtractor
from .models.modeling_ehrbert import (
    EhrBertForICDCoding,
    EhrBertForMaskedLM,
    EhrBertForPreTraining,
    EhrBertForSequenceClassification,
    EhrBertModel,
)
from .models.modeling_ehrbert_embeddings import extend_position_embeddings
from .models.modeling_ehrconcat import (
    EhrConcatForMedicationRecommendation,
    EhrConcatForNoteClassification,
    EhrConcatForSequenceClassification,
    EhrConcatModel,
)
from .models.modeling_ehrfusion import EhrFusionForSequenceClassification, EhrFusionModel
from .models.modeling_ehrrnn import EhrRnnForSequenceClassification, EhrRnnModel
from .models.modeling_ehrseries import EhrSeriesForSequenceClassification, EhrSeriesModel
from .models.modeling_ehrtagger import EhrTaggerForTokenClassification, EhrTaggerModel
from .models.modeling_ehrtext import EhrTextForICDCoding, EhrTextModel
from .models.modeling_gbert import GBertForMedicationRecommendation, GBertForPreTraining, GBertModel
from .models.modeling_medbert import (
    MedBertForMaskedLM,
    MedBertForPreTraining,
    MedBertForSequenceClassification,
    MedBertModel,
)
from .models.modeling_medhmp import (
    MedHMPForAdmissionClassification,
    MedHMPForAdmissionPreTraining,
    MedHMPForStayClassification,
    MedHMPForStayPreTraining,
    MedHMPModel,
    MedHMPStayModel,
)
from .models.modeling_medmplm import (
    MedMPLMForICDCoding,
    MedMPLMForMedicationRecommendation,
    MedMPLMForPreTraining,
    MedMPLMForReadmission,
    MedMPLMModel,
)
from .models.modeling_visitrnn import VisitRnnForMedicationRecommendation, VisitRnnModel
from .models.pipeline_patient_tasks import (
    MedicationRecommendationPipeline,
    PatientFeatureExtractionPipeline,
    RiskPredictionPipeline,
)
from .models.processing_medhmp import MedHMPProcessor
from .models.processing_medmplm import MedMPLMProcessor
from .models.tokenization_ehr import EhrCodeTokenizer
from .pipelines import TASK as _ICD_CODING
from .pipelines import ICDCodingPipeline
from .version import __version__

AutoConfig.register("ehr_medbert", MedBertConfig, exist_ok=True)
AutoModel.register(MedBertConfig, MedBertModel, exist_ok=True)
AutoModelForMaskedLM.register(MedBertConfig, MedBertForMaskedLM, exist_ok=True)
AutoModelForPreTraining.register(MedBertConfig, MedBertForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(MedBertConfig, MedBertForSequenceClassification, exist_ok=True)
AutoTokenizer.register(MedBertConfig, tokenizer_class=EhrCodeTokenizer, exist_ok=True)

AutoConfig.register("ehr_rnn", EhrRnnConfig, exist_ok=True)
AutoModel.register(EhrRnnConfig, EhrRnnModel, exist_ok=True)
AutoModelForSequenceClassification.register(EhrRnnConfig, EhrRnnForSequenceClassification, exist_ok=True)
AutoTokenizer.register(EhrRnnConfig, tokenizer_class=EhrCodeTokenizer, exist_ok=True)

AutoConfig.register("ehr_bert", EhrBertConfig, exist_ok=True)
AutoModel.register(EhrBertConfig, EhrBertModel, exist_ok=True)
AutoModelForMaskedLM.register(EhrBertConfig, EhrBertForMaskedLM, exist_ok=True)
AutoModelForPreTraining.register(EhrBertConfig, EhrBertForPreTraining, exist_ok=True)
# Of the two the library takes the one that the checkpoint's `architectures` name, and the first for a bare encoder.
AutoModelForSequenceClassification.register(
    EhrBertConfig, (EhrBertForSequenceClassification, EhrBertForICDCoding), exist_ok=True
)

AutoConfig.register("ehr_text", EhrTextConfig, exist_ok=True)
AutoModel.register(EhrTextConfig, EhrTextModel, exist_ok=True)
AutoModelForSequenceClassification.register(EhrTextConfig, EhrTextForICDCoding, exist_ok=True)

AutoConfig.register("ehr_series", EhrSeriesConfig, exist_ok=True)
AutoModel.register(EhrSeriesConfig, EhrSeriesModel, exist_ok=True)
AutoModelForSequenceClassification.register(EhrSeriesConfig, EhrSeriesForSequenceClassification, exist_ok=True)

AutoConfig.register("ehr_fusion", EhrFusionConfig, exist_ok=True)
AutoModel.register(EhrFusionConfig, EhrFusionModel, exist_ok=True)
AutoModelForSequenceClassification.register(EhrFusionConfig, EhrFusionForSequenceClassification, exist_ok=True)

# As above: the checkpoint's `architectures` decide between the level of stays and that of admissions.
AutoConfig.register("ehr_medhmp", MedHMPConfig, exist_ok=True)
AutoFeatureExtractor.register(MedHMPConfig, HourlyFeatureExtractor, exist_ok=True)
AutoProcessor.register(MedHMPConfig, MedHMPProcessor, exist_ok=True)
AutoModel.register(MedHMPConfig, (MedHMPModel, MedHMPStayModel), exist_ok=True)
AutoModelForPreTraining.register(
    MedHMPConfig, (MedHMPForAdmissionPreTraining, MedHMPForStayPreTraining), exist_ok=True
)
AutoModelForSequenceClassification.register(
    MedHMPConfig, (MedHMPForAdmissionClassification, MedHMPForStayClassification), exist_ok=True
)

AutoConfig.register("ehr_gbert", GBertConfig, exist_ok=True)
AutoModel.register(GBertConfig, GBertModel, exist_ok=True)
AutoModelForPreTraining.register(GBertConfig, GBertForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(GBertConfig, GBertForMedicationRecommendation, exist_ok=True)
AutoProcessor.register(GBertConfig, MedMPLMProcessor, exist_ok=True)

AutoConfig.register("ehr_medmplm", MedMPLMConfig, exist_ok=True)
AutoProcessor.register(MedMPLMConfig, MedMPLMProcessor, exist_ok=True)
AutoModel.register(MedMPLMConfig, MedMPLMModel, exist_ok=True)
AutoModelForPreTraining.register(MedMPLMConfig, MedMPLMForPreTraining, exist_ok=True)
# As above: the checkpoint's `architectures` decide between the tasks.
AutoModelForSequenceClassification.register(
    MedMPLMConfig, (MedMPLMForReadmission, MedMPLMForMedicationRecommendation, MedMPLMForICDCoding), exist_ok=True
)

AutoConfig.register("ehr_visitrnn", VisitRnnConfig, exist_ok=True)
AutoModel.register(VisitRnnConfig, VisitRnnModel, exist_ok=True)
AutoModelForSequenceClassification.register(VisitRnnConfig, VisitRnnForMedicationRecommendation, exist_ok=True)

AutoConfig.register("ehr_concat", EhrConcatConfig, exist_ok=True)
AutoModel.register(EhrConcatConfig, EhrConcatModel, exist_ok=True)
# As above: the checkpoint's `architectures` decide between the tasks.
AutoModelForSequenceClassification.register(
    EhrConcatConfig,
    (EhrConcatForSequenceClassification, EhrConcatForMedicationRecommendation, EhrConcatForNoteClassification),
    exist_ok=True,
)

AutoConfig.register("ehr_tagger", EhrTaggerConfig, exist_ok=True)
AutoModel.register(EhrTaggerConfig, EhrTaggerModel, exist_ok=True)
AutoModelForTokenClassification.register(EhrTaggerConfig, EhrTaggerForTokenClassification, exist_ok=True)

# The library warns of a second registration, which a reload would be.
for _task, _pipeline, _auto in (
    (_ICD_CODING, ICDCodingPipeline, AutoModelForSequenceClassification),
    ("risk-prediction", RiskPredictionPipeline, AutoModelForSequenceClassification),
    ("medication-recommendation", MedicationRecommendationPipeline, AutoModelForSequenceClassification),
    ("patient-feature-extraction", PatientFeatureExtractionPipeline, AutoModel),
):
    if _task not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(_task, _pipeline, pt_model=_auto, type="text")

__all__ = [
    "EhrBertConfig",
    "EhrBertForICDCoding",
    "EhrBertForMaskedLM",
    "EhrBertForPreTraining",
    "EhrBertForSequenceClassification",
    "EhrBertModel",
    "EhrCodeTokenizer",
    "EhrConcatConfig",
    "EhrConcatForMedicationRecommendation",
    "EhrConcatForNoteClassification",
    "EhrConcatForSequenceClassification",
    "EhrConcatModel",
    "EhrFusionConfig",
    "EhrFusionForSequenceClassification",
    "EhrFusionModel",
    "EhrRnnConfig",
    "EhrRnnForSequenceClassification",
    "EhrRnnModel",
    "EhrSeriesConfig",
    "EhrSeriesForSequenceClassification",
    "EhrSeriesModel",
    "EhrTaggerConfig",
    "EhrTaggerForTokenClassification",
    "EhrTaggerModel",
    "EhrTextConfig",
    "EhrTextForICDCoding",
    "EhrTextModel",
    "GBertConfig",
    "GBertForMedicationRecommendation",
    "GBertForPreTraining",
    "GBertModel",
    "HourlyFeatureExtractor",
    "ICDCodingPipeline",
    "MedBertConfig",
    "MedBertForMaskedLM",
    "MedBertForPreTraining",
    "MedBertForSequenceClassification",
    "MedBertModel",
    "MedHMPConfig",
    "MedHMPForAdmissionClassification",
    "MedHMPForAdmissionPreTraining",
    "MedHMPForStayClassification",
    "MedHMPForStayPreTraining",
    "MedHMPModel",
    "MedHMPProcessor",
    "MedHMPStayModel",
    "MedMPLMConfig",
    "MedMPLMForICDCoding",
    "MedMPLMForMedicationRecommendation",
    "MedMPLMForPreTraining",
    "MedMPLMForReadmission",
    "MedMPLMModel",
    "MedMPLMProcessor",
    "MedicationRecommendationPipeline",
    "PatientFeatureExtractionPipeline",
    "RiskPredictionPipeline",
    "VisitRnnConfig",
    "VisitRnnForMedicationRecommendation",
    "VisitRnnModel",
    "__version__",
    "extend_position_embeddings",
]
