"""What each kind of policy object may say, declared once.

``kinds`` is the vocabulary of declarations, ``cilium`` and ``kubernetes`` are the declarations. From them come the
parser's checks (``check``), the CustomResourceDefinitions in ``install/crds`` (``openapi``) and the reference page
(``page``).
"""
