from hypothesis import settings

settings.register_profile("soda", deadline=None)  # a busy machine is no defect
settings.load_profile("soda")
