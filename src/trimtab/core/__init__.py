"""The ground floor: cards, edits, costs, budgets, artifacts and errors. Nothing here imports a higher floor."""
