from .radau import as_mesh
def meshes_of(problem, mesh):
    return {n: as_mesh(mesh) for n in problem.phases}
