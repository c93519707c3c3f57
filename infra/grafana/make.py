"""The dashboards as Grafana imports them: `python -m infra.grafana.make` writes the JSON files beside this one."""

from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, timeseries
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

from infra.grafana.panels import DASHBOARDS, Dashboard, Panel

HERE = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT = 6, 8  # of a panel; Grafana's grid has 24 columns


def drawn(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST)
    found = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(SOURCE).span(WIDTH).height(HEIGHT)
    found = found.legend(legend.placement(LegendPlacement.BOTTOM)).min(0)
    if panel.exporter:
        found = found.description(f"Needs {panel.exporter}'s exporter.")
    for letter, (name, expression) in zip("ABCDEF", panel.queries.items(), strict=False):
        found = found.with_target(prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(name))
    return found


def dashboard(wanted: Dashboard) -> str:
    made = builder.Dashboard(wanted.title).uid(wanted.uid).tags(["mqwen"]).refresh("10s").time("now-1h", "now")
    made = made.timezone("browser").with_variable(builder.DatasourceVariable("datasource").type("prometheus"))
    for name, (label, metric) in wanted.variables.items():
        values = builder.QueryVariable(name).datasource(SOURCE).query(f"label_values({metric}, {label})")
        made = made.with_variable(values.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True))
    for title, panels in wanted.rows.items():
        made = made.with_row(builder.Row(title))
        for panel in panels:
            made = made.with_panel(drawn(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def main() -> None:
    for wanted in DASHBOARDS:
        (HERE / f"{wanted.uid}.json").write_text(dashboard(wanted))


if __name__ == "__main__":
    main()
