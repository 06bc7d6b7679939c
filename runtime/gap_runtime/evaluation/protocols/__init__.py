"""Rules by which answers become scores; each fits evaluation.protocol.ScoringProtocol."""
